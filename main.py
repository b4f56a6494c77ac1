"""Trains, evaluates and more: `python main.py --config configs/msda.py --workdir runs/msda`."""

from fdep_jax import cli

if __name__ == "__main__":
  cli.start()
