"""Checks the input of the classical detectors."""

import numpy as np


def checked(image):
  """The image as H×W float64.

  Raises:
    ValueError: it is not a non-empty H×W array of finite numbers.
  """
  image = np.asarray(image)
  if image.ndim != 2 or not image.size or image.dtype.kind not in "buif":
    raise ValueError(
      f"The image is {image.dtype} of shape {image.shape}; give H×W grey levels, one channel."
    )
  image = image.astype(np.float64)
  if not np.isfinite(image).all():
    raise ValueError("The image holds NaN or infinite values; replace them first.")
  return image
