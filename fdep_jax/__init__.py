"""FDEP: infrared small-target detection taught by a frozen foundation model, in JAX/Flax NNX."""

__version__ = "0.1.0"
