"""Random crop and the training recipe's augmentation, in numpy and scipy.

All functions take an image H×W×3 uint8 and its mask H×W bool and give the same again. Every random
number comes from the generator that is passed in.

Source of the recipe: YuChuang1205/PAL train_model.py (albumentations 1.3.0).
"""

import numpy as np
from scipy import ndimage


def random_crop(
  image, mask, size: int, rng: np.random.Generator, target_prob: float = 0.0, margin: int = 0
):
  """A size×size window, uniform over all positions; zeros at the right and bottom where it ends.

  Args:
    margin: pixels of zeros beyond the right and bottom border that every window may reach into;
      the recipe's is 0.
    target_prob: probability of placing the window so that it holds a target pixel, which is then
      drawn uniformly from the mask (uniformly placed where the mask is empty). The recipe's is 0:
      many of its crops have no target.
  """
  bottom, right = (max(size - side, margin) for side in mask.shape)
  image = np.pad(image, ((0, bottom), (0, right), (0, 0)))
  mask = np.pad(mask, ((0, bottom), (0, right)))
  lowest = np.zeros(2, int)
  highest = np.array(mask.shape) - size
  if target_prob > 0 and rng.random() < target_prob and mask.any():
    pixels = np.argwhere(mask)
    pixel = pixels[rng.integers(len(pixels))]
    lowest = np.maximum(lowest, pixel - size + 1)
    highest = np.minimum(highest, pixel)
  y, x = rng.integers(lowest, highest, endpoint=True)
  return image[y : y + size, x : x + size], mask[y : y + size, x : x + size]


def warp(image, mask, matrix: np.ndarray, shift: np.ndarray):
  """Samples both at `matrix` @ (p − centre) + centre + `shift` for every output pixel p = (y, x).

  Bilinear for the image, nearest for the mask. Beyond the border both are mirrored about the
  border pixel (reflect-101), so that targets near it may appear twice, in image and mask alike.
  """
  centre = (np.array(mask.shape) - 1) / 2
  offset = centre + shift - matrix @ centre
  if matrix[0, 1] == matrix[1, 0] == 0:
    matrix = np.diag(matrix)  # scipy's faster way where the axes do not mix
  grey = (image == image[..., :1]).all()
  channels = [
    ndimage.affine_transform(
      image[..., c].astype(np.float32), matrix, offset, order=1, mode="mirror"
    )
    for c in range(1 if grey else 3)
  ]
  warped = np.rint(np.stack(channels * 3 if grey else channels, axis=-1)).astype(np.uint8)
  warped_mask = ndimage.affine_transform(
    mask.astype(np.uint8), matrix, offset, order=0, mode="mirror"
  )
  return warped, warped_mask > 0


def _round(values: np.ndarray) -> np.ndarray:
  # OUR CHOICE: rounds where the recipe's library cuts off, which darkens by half a grey level.
  return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def vertical_flip(image, mask, rng):
  return image[::-1], mask[::-1]


def horizontal_flip(image, mask, rng):
  return image[:, ::-1], mask[:, ::-1]


def transpose(image, mask, rng):
  return image.swapaxes(0, 1), mask.T


def rotate90(image, mask, rng):
  turns = int(rng.integers(4))
  return np.rot90(image, turns), np.rot90(mask, turns)


def rotate(image, mask, rng):
  """By up to ±45°, about the centre."""
  angle = np.deg2rad(rng.uniform(-45, 45))
  cos, sin = np.cos(angle), np.sin(angle)
  return warp(image, mask, np.array([[cos, -sin], [sin, cos]]), np.zeros(2))


def shift(image, mask, rng):
  """By up to ±10 % of the height and, independently, of the width; fractions of pixels count."""
  return warp(image, mask, np.eye(2), rng.uniform(-0.1, 0.1, 2) * mask.shape)


def scale(image, mask, rng):
  """By a factor of 0.8 to 1.2 about the centre."""
  return warp(image, mask, np.eye(2) / rng.uniform(0.8, 1.2), np.zeros(2))


def brightness(image, mask, rng):
  return _round(image + np.float32(rng.uniform(-0.3, 0.3) * 255)), mask


def contrast(image, mask, rng):
  """Times 0.7 to 1.3; about zero, not about the mean."""
  return _round(image * np.float32(rng.uniform(0.7, 1.3))), mask


def noise(image, mask, rng):
  """Gaussian, of variance 10 to 50 grey levels²; independent per channel, as the recipe's."""
  deviation = np.float32(np.sqrt(rng.uniform(10, 50)))
  return _round(image + deviation * rng.standard_normal(image.shape, np.float32)), mask


def unchanged(image, mask, rng):
  return image, mask


# The recipe gives each transform a probability, but its library only draws with these as weights
# and then always applies what was drawn.
WEIGHTS = {
  vertical_flip: 0.5,
  horizontal_flip: 0.5,
  transpose: 0.5,
  rotate90: 0.5,
  brightness: 0.2,
  contrast: 0.2,
  rotate: 0.3,
  shift: 0.5,
  scale: 0.5,
  noise: 0.2,
  unchanged: 1.0,  # twice in the recipe's list, 0.5 each
}
_TRANSFORMS = list(WEIGHTS)
_PHOTOMETRIC = (brightness, contrast, noise)
_PROBABILITIES = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())


def draw(rng: np.random.Generator) -> list:
  """The transforms for one sample: none in half the cases, else three with replacement."""
  if rng.random() >= 0.5:
    return []
  return [_TRANSFORMS[i] for i in rng.choice(len(_TRANSFORMS), size=3, p=_PROBABILITIES)]


def recipe(image, mask, rng):
  """The paper's augmentation; transforms are applied one after the other, in the order drawn."""
  for transform in draw(rng):
    image, mask = transform(image, mask, rng)
  return image, mask


def geometric(image, mask, rng):
  """The recipe without brightness, contrast and noise."""
  for transform in draw(rng):
    if transform not in _PHOTOMETRIC:
      image, mask = transform(image, mask, rng)
  return image, mask


def photometric(image, mask, rng):
  """Of the recipe only brightness, contrast and noise."""
  for transform in draw(rng):
    if transform in _PHOTOMETRIC:
      image, mask = transform(image, mask, rng)
  return image, mask


def dihedral(image, mask, rng):
  """One of the square's eight symmetries, uniformly; changes no pixel value."""
  turns, mirrored = int(rng.integers(4)), rng.integers(2)
  if mirrored:
    image, mask = image[:, ::-1], mask[:, ::-1]
  return np.rot90(image, turns), np.rot90(mask, turns)


AUGMENTATIONS = {"recipe": recipe, "dihedral": dihedral, "none": unchanged}

# With a prior bank: what is drawn once for a crop, and what anew at every use (see `CropBank`).
BANKED = {
  "recipe": (geometric, photometric),
  "dihedral": (dihedral, unchanged),
  "none": (unchanged, unchanged),
}
