"""Random crop and the training recipe's augmentation, in numpy and scipy.

Every function takes and returns an image (H×W×3 uint8) and its mask (H×W bool). All random numbers
come from the generator passed in.

Source of the recipe: YuChuang1205/PAL train_model.py (albumentations 1.3.0).
"""

import numpy as np
from scipy import ndimage


def random_crop(
  image, mask, size: int, rng: np.random.Generator, target_prob: float = 0.0, margin: int = 0
):
  """Cuts a size×size window at a uniformly random position.

  A smaller image is first extended by zeros at the right and bottom.

  Args:
    margin: a window may reach this many pixels beyond the right and bottom border, into zeros; 0
      in the recipe.
    target_prob: probability of choosing a window that contains a target pixel drawn uniformly from
      the mask (any window if the mask is empty). 0 in the recipe: many of its crops have no target.
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

  The image is interpolated bilinearly, the mask by nearest neighbour. Beyond the border both are
  mirrored about the border pixel (reflect-101), so a target near it may appear twice in both.
  """
  centre = (np.array(mask.shape) - 1) / 2
  offset = centre + shift - matrix @ centre
  if matrix[0, 1] == matrix[1, 0] == 0:
    matrix = np.diag(matrix)  # scipy is faster with the diagonal alone
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
  # OUR CHOICE: rounds. The recipe's library truncates, which darkens by half a grey level.
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
  """Rotates by up to ±45° about the centre."""
  angle = np.deg2rad(rng.uniform(-45, 45))
  cos, sin = np.cos(angle), np.sin(angle)
  return warp(image, mask, np.array([[cos, -sin], [sin, cos]]), np.zeros(2))


def shift(image, mask, rng):
  """Shifts by up to ±10 % of the height and, independently, of the width; not in whole pixels."""
  return warp(image, mask, np.eye(2), rng.uniform(-0.1, 0.1, 2) * mask.shape)


def scale(image, mask, rng):
  """Scales by a factor of 0.8 to 1.2 about the centre."""
  return warp(image, mask, np.eye(2) / rng.uniform(0.8, 1.2), np.zeros(2))


def brightness(image, mask, rng):
  return _round(image + np.float32(rng.uniform(-0.3, 0.3) * 255)), mask


def contrast(image, mask, rng):
  """Multiplies the grey levels by 0.7 to 1.3; zero stays, not the mean."""
  return _round(image * np.float32(rng.uniform(0.7, 1.3))), mask


def noise(image, mask, rng):
  """Adds Gaussian noise of variance 10 to 50 grey levels², per channel as in the recipe."""
  deviation = np.float32(np.sqrt(rng.uniform(10, 50)))
  return _round(image + deviation * rng.standard_normal(image.shape, np.float32)), mask


def unchanged(image, mask, rng):
  return image, mask


# The recipe gives each transform a probability. Its library uses them only as weights to draw a
# transform, and always applies the drawn one.
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
  """Draws the transforms for one sample: none in half the cases, else three with replacement."""
  if rng.random() >= 0.5:
    return []
  return [_TRANSFORMS[i] for i in rng.choice(len(_TRANSFORMS), size=3, p=_PROBABILITIES)]


def recipe(image, mask, rng):
  """Applies the paper's augmentation: the drawn transforms, in the order drawn."""
  for transform in draw(rng):
    image, mask = transform(image, mask, rng)
  return image, mask


def geometric(image, mask, rng):
  """Applies the recipe without brightness, contrast and noise."""
  for transform in draw(rng):
    if transform not in _PHOTOMETRIC:
      image, mask = transform(image, mask, rng)
  return image, mask


def photometric(image, mask, rng):
  """Applies only the recipe's brightness, contrast and noise."""
  for transform in draw(rng):
    if transform in _PHOTOMETRIC:
      image, mask = transform(image, mask, rng)
  return image, mask


def dihedral(image, mask, rng):
  """Applies one of the square's eight symmetries, drawn uniformly; changes no pixel value."""
  turns, mirrored = int(rng.integers(4)), rng.integers(2)
  if mirrored:
    image, mask = image[:, ::-1], mask[:, ::-1]
  return np.rot90(image, turns), np.rot90(mask, turns)


AUGMENTATIONS = {"recipe": recipe, "dihedral": dihedral, "none": unchanged}

# With a prior bank: (drawn once per crop, drawn anew at every use); see `CropBank`.
BANKED = {
  "recipe": (geometric, photometric),
  "dihedral": (dihedral, unchanged),
  "none": (unchanged, unchanged),
}
