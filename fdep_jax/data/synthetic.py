"""Synthetic infrared scenes: clouds, sea clutter or hot edges, sensor noise, and small targets.

For the quick start and for tests; no published number rests on them. OUR CHOICE throughout: the
paper uses real images only.
"""

import numpy as np
from scipy import ndimage

from fdep_jax.data.samples import Sample

TARGETS = (1, 5)  # per scene
AREA = (2, 80)  # pixels of a target's mask; the paper's range of small targets
CONTRAST = (2.0, 8.0)  # signal / local noise, for the mean over the mask and for the peak
RING = (2, 8)  # distances from a mask, in pixels, that count as local; nearer ones are its halo
_GAP = 4  # pixels between targets, and to the border


def scenes(count: int, size: int | tuple[int, int], seed: int) -> list[Sample]:
  """Makes `count` scenes of size×size (or height × width) pixels, at least 64 each way.

  Scene i depends only on `seed`, i and `size`, so a longer list starts with the shorter one.
  """
  height, width = (size, size) if isinstance(size, int) else size
  if min(height, width) < 64:
    raise ValueError(f"scene size is {height}×{width}; it must be at least 64×64")
  return [scene(seed, i, height, width)[0] for i in range(count)]


def scene(seed: int, index: int, height: int, width: int) -> tuple[Sample, np.ndarray]:
  """Makes one scene; also returns its background without targets (H×W float32, grey levels)."""
  rng = np.random.default_rng([seed, index])
  make = (_clouds, _sea, _hot_edges)[rng.integers(3)]
  background = _sensor(make(rng, height, width), rng)
  signal, mask = _targets(background, rng)
  grey = np.clip(np.rint(background + signal), 0, 255).astype(np.uint8)
  image = np.repeat(grey[..., None], 3, axis=-1)
  return Sample(f"synthetic_{index:05d}", image, mask), background


def local_noise(background: np.ndarray, mask: np.ndarray) -> float:
  """Computes the background's standard deviation in the ring `RING` around a target's mask."""
  inner, outer = (ndimage.binary_dilation(mask, np.ones((3, 3)), n) for n in RING)
  return float(background[outer & ~inner].std())


# ------------------------------------------------------------------------------------ backgrounds


def _noise(rng, height, width, slope, stretch=1.0):
  """Makes noise with amplitude ∝ 1/frequency^slope, mean 0, deviation 1.

  `stretch` > 1 elongates it along x.
  """
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None] * stretch)
  frequency[0, 0] = np.inf
  spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**slope
  field = np.fft.irfft2(spectrum, (height, width))
  return (field / field.std()).astype(np.float32)


def _clouds(rng, height, width):
  """Sky with a gradient, soft clouds, and banks of cloud with edges."""
  rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
  sky = rng.uniform(40, 110) + rng.uniform(-5, 20) * rows
  soft = rng.uniform(3, 12) * _noise(rng, height, width, rng.uniform(1.6, 2.2), 1.5)
  field = _noise(rng, height, width, rng.uniform(1.7, 2.1), 1.3)
  bank = 1 / (1 + np.exp(-rng.uniform(3, 8) * (field - rng.uniform(-0.3, 0.8))))
  texture = 1 + 0.25 * _noise(rng, height, width, 1.8)
  return sky + soft + rng.uniform(15, 60) * bank * texture


def _sea(rng, height, width):
  """Sea below a horizon (sometimes above the frame): swell, waves, and glints in the sun's lane."""
  horizon = int(rng.uniform(-0.2, 0.35) * height)
  rows = np.arange(height, dtype=np.float32)[:, None]
  columns = np.arange(width, dtype=np.float32)[None]
  depth = np.clip((rows - horizon) / (height - horizon), 0.02, 1)  # nearness to the viewer
  phase = 9 * np.log(depth) / rng.uniform(0.15, 0.35) + 1.5 * _noise(rng, height, width, 1.8, 0.5)
  swell = np.sin(phase + 2 * np.pi * columns / width * rng.uniform(-3, 3))
  waves = _noise(rng, height, width, rng.uniform(1.0, 1.4), rng.uniform(2.0, 4.0))
  level = rng.uniform(50, 100)
  sea = level + depth * (rng.uniform(1, 5) * swell + rng.uniform(4, 12) * waves)
  lane = np.exp(-(((columns - rng.uniform(0, width)) / (rng.uniform(0.08, 0.3) * width)) ** 2))
  sparks = rng.random((height, width)) < 0.012 * lane * rng.uniform(0.2, 1)
  streaks = ndimage.gaussian_filter(sparks * rng.exponential(1.0, (height, width)), (0.4, 1.4))
  sea += 30 * np.minimum(streaks, 0.8)
  sky = level + rng.uniform(-25, 15) + 3 * _noise(rng, height, width, 2.0, 3.0)
  return np.where(rows < horizon, sky + 8 * rows / height, sea)


def _hot_edges(rng, height, width):
  """Sky over ground with a warm ridge line, or over buildings with hot edges."""
  columns = np.arange(width)
  rows = np.arange(height, dtype=np.float32)[:, None]
  walk = np.cumsum(rng.standard_normal(width))
  walk = ndimage.gaussian_filter1d(walk - np.linspace(0, walk[-1], width), 2.0)
  ridge = height * rng.uniform(0.35, 0.75) + walk * 0.1 * height / (walk.std() + 1e-6)
  roughness = rng.uniform(4, 12)
  ground = rng.uniform(70, 120) + roughness * _noise(rng, height, width, rng.uniform(1.3, 1.8))
  top = ridge[None] * np.ones_like(rows)
  for _ in range(rng.integers(0, 6)):  # buildings
    left, wide = rng.integers(0, width - 8), rng.integers(8, max(9, width // 6))
    inside = (columns >= left) & (columns < left + wide)
    roof = ridge[left] - rng.uniform(0.03, 0.25) * height
    wall = inside[None] & (rows > roof)
    ground = np.where(wall, rng.uniform(60, 140) + 0.3 * (ground - ground.mean()), ground)
    top = np.where(inside[None], np.minimum(top, roof), top)
    beams = wall & (((columns - left) % 12 < 1)[None] | ((rows - roof) % 14 < 1))
    ground = ground + beams * rng.uniform(5, 25)
  sky = rng.uniform(20, 60) + 15 * rows / height + 3 * _noise(rng, height, width, 2.0)
  below = 1 / (1 + np.exp(-(rows - top) / 0.6))
  rim = np.exp(-(((rows - top) / rng.uniform(1, 3)) ** 2))
  return sky * (1 - below) + ground * below + rng.uniform(10, 45) * rim


def _sensor(scene_, rng):
  """Optical blur, readout noise, fixed-pattern noise of rows and columns, dead and hot pixels."""
  height, width = scene_.shape
  image = ndimage.gaussian_filter(scene_, rng.uniform(0.5, 0.9))
  image = image + rng.uniform(1.5, 4.0) * rng.standard_normal((height, width))
  image += rng.uniform(0.2, 1.0) * rng.standard_normal((1, width))
  image += rng.uniform(0.1, 0.5) * rng.standard_normal((height, 1))
  dead = rng.random((height, width)) < 3e-5
  image = np.where(dead, rng.choice([0.0, 230.0], (height, width)), image)
  return np.clip(image, 0, 255).astype(np.float32)


# ---------------------------------------------------------------------------------------- targets


def _targets(background, rng):
  """Draws signal (H×W float32, grey levels) and mask (H×W bool) of 1 to 5 separate targets."""
  height, width = background.shape
  signal = np.zeros_like(background)
  mask = np.zeros(background.shape, bool)
  wanted = rng.integers(*TARGETS, endpoint=True)
  placed = attempts = 0
  # A target that would saturate or touch an earlier one is drawn again; a scene has at least one.
  while placed < wanted and (attempts < 200 or not placed):
    attempts += 1
    profile, shape = _blob(rng)
    side_y, side_x = shape.shape
    y = int(rng.integers(_GAP, height - side_y - _GAP))
    x = int(rng.integers(_GAP, width - side_x - _GAP))
    here = np.zeros_like(mask)
    here[y : y + side_y, x : x + side_x] = shape
    if (ndimage.binary_dilation(here, np.ones((3, 3)), _GAP) & mask).any():
      continue
    mean = profile[shape].mean()  # the profile's peak is 1
    noise = local_noise(background, here)
    peak = noise * rng.triangular(CONTRAST[0] / mean, CONTRAST[1], CONTRAST[1])
    if peak + background[here].max() > 250 or noise == 0:
      continue
    signal[y : y + side_y, x : x + side_x] += peak * profile
    mask |= here
    placed += 1
  return signal, mask


def _blob(rng):
  """Draws a target's profile, with peak 1, and its mask, on the smallest patch for both.

  The shape is an ellipse, sometimes smeared along a line. Its profile is between Gaussian and
  nearly flat. The brightest pixels are the mask; their number is log-uniform within `AREA`.
  """
  while True:
    area = int(np.rint(np.exp(rng.uniform(np.log(AREA[0] - 0.49), np.log(AREA[1] + 0.49)))))
    smear = rng.uniform(1.0, 2.5) if rng.random() < 0.3 else 0.0  # path over the minor diameter
    aspect = rng.uniform(1.0, 1.8)
    minor = np.sqrt(area / (np.pi * aspect + 4 * smear))
    reach = int(np.ceil(minor * (aspect + 2 * smear))) + 4
    dy, dx = rng.uniform(-0.5, 0.5, 2)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    angle = rng.uniform(0, np.pi)
    along = (x - dx) * np.cos(angle) + (y - dy) * np.sin(angle)
    across = (y - dy) * np.cos(angle) - (x - dx) * np.sin(angle)
    path = minor * smear
    along = along - np.clip(along, -path, path)
    radius = np.hypot(along / (minor * aspect), across / minor)  # 1 on the contour
    profile = np.exp(-np.log(2) * radius ** rng.uniform(3, 10))
    profile = (profile / profile.max()).astype(np.float32)
    brightest = np.argsort(-profile, axis=None, kind="stable")[:area]
    mask = np.zeros(profile.shape, bool)
    mask.flat[brightest] = True
    if ndimage.label(mask, np.ones((3, 3)))[1] == 1 and profile[mask].min() >= 0.25:
      profile[profile < 0.02] = 0
      rows, columns = (np.flatnonzero(profile.any(axis)) for axis in (1, 0))
      box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
      return profile[box], mask[box]
