"""Trains infrared small-target detectors with the help of a frozen foundation model (FDEP)."""

__version__ = "0.1.0"
