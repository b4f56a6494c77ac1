"""The config of a published network, in the form that --config takes: `of_file.py:NETWORK`."""

from fdep_jax import detector


def get_config(backbone: str):
  return detector.config_of(backbone)
