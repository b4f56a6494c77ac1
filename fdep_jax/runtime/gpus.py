"""Describes NVIDIA's cards to XLA's GPU compiler, which then needs none of them.

Cores, clocks, caches, bandwidths and FLOP/s are NVIDIA's: the architecture whitepapers GA100,
GA102, GH100, Ada (2.01, with the L4) and RTX Blackwell (1.1). FLOP/s are dense, of tensor cores
that sum in float32. The memory is what CUDA reports, less than the name says. For the A100 and H100
it, the clock and the cache are those of openxla/xla, xla/backends/gpu/target_config/specs.
"""

from typing import NamedTuple

_GIB, _MIB = 2**30, 2**20


class Gpu(NamedTuple):
  """One card."""

  name: str
  capability: tuple[int, int]
  cores: int  # streaming multiprocessors
  clock: float  # GHz, boost
  cache: int  # bytes of L2
  memory: float  # bytes
  bandwidth: float  # bytes of memory a second
  bfloat16: float  # FLOP/s
  float32: float  # FLOP/s in TF32, which JAX uses for products of float32


class Core(NamedTuple):
  """One streaming multiprocessor: CUDA C++ Programming Guide, table of compute capabilities."""

  threads: int
  lanes: int  # of float32
  shared: int  # KiB of shared memory; a block can have 1 less


_CORES = {
  (8, 0): Core(2048, 64, 164),
  (8, 6): Core(1536, 128, 100),
  (8, 9): Core(1536, 128, 100),
  (9, 0): Core(2048, 128, 228),
  (12, 0): Core(1536, 128, 100),
}
_L4 = 23034 * _MIB - 347 * _MIB  # nvidia-smi's figure, less what CUDA withholds of an RTX 4090
GPUS = {
  "a100-40": Gpu(
    "A100-SXM4-40GB", (8, 0), 108, 1.41, 40 * _MIB, 42331013120, 1.555e12, 312e12, 156e12
  ),
  "a100-80": Gpu(
    "A100-SXM4-80GB", (8, 0), 108, 1.41, 40 * _MIB, 85100068864, 2.039e12, 312e12, 156e12
  ),
  "h100": Gpu(
    "H100 80GB HBM3", (9, 0), 132, 1.98, 50 * _MIB, 84942979072, 3.352e12, 989.4e12, 494.7e12
  ),
  # As in github.com/lmstudio-ai/lmstudio-bug-tracker/issues/1638.
  "l4": Gpu("L4", (8, 9), 58, 2.04, 48 * _MIB, _L4, 0.3e12, 121e12, 60.5e12),
  # Memory as in github.com/ucwxb/GraphAvatar/issues/4.
  "rtx3090": Gpu(
    "GeForce RTX 3090", (8, 6), 82, 1.695, 6 * _MIB, 23.69 * _GIB, 0.936e12, 71e12, 35.6e12
  ),
  # As in github.com/TRI-ML/packnet-sfm/issues/250.
  "rtx4090": Gpu(
    "GeForce RTX 4090", (8, 9), 128, 2.52, 72 * _MIB, 23.65 * _GIB, 1.008e12, 165.2e12, 82.6e12
  ),
  # As in github.com/TrajectoryCrafter/TrajectoryCrafter/issues/20.
  "rtx5090": Gpu(
    "GeForce RTX 5090", (12, 0), 170, 2.407, 96 * _MIB, 31.36 * _GIB, 1.792e12, 209.5e12, 104.8e12
  ),
}


def target(kind: str) -> str:
  """Writes a card of `GPUS` as the text of XLA's `GpuTargetConfigProto`."""
  gpu = GPUS[kind]
  major, minor = gpu.capability
  core = _CORES[gpu.capability]
  # sm_90a: the H100's own instructions, which the driver reports on this card.
  extension = "ACCELERATED_FEATURES" if major == 9 else "NONE"
  return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {gpu.cores}
  fpus_per_core: {core.lanes}
  threads_per_core_limit: {core.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_core: {core.shared * 1024}
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {(core.shared - 1) * 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  clock_rate_ghz: {gpu.clock}
  l2_cache_size: {gpu.cache}
  device_memory_size: {int(gpu.memory)}
  memory_bandwidth: {int(gpu.bandwidth)}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {gpu.name}"
"""
