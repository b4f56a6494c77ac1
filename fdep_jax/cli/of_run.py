"""The config of a run's folder, in the form that --config takes: `of_run.py:RUN`."""

from fdep_jax import settings


def get_config(workdir: str):
  return settings.load(workdir)
