"""The config of a file's network, in the form that --config takes: `of_file.py:NETWORK`.

Or `of_file.py:CHECKPOINT` for a light branch, whose file names its network.
"""

from fdep_jax import detector, zoo


def get_config(name: str):
  return detector.config_of(detector.network_of(name) if zoo.is_light(name) else name)
