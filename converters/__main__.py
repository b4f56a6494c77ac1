"""Converts the weight file of a foundation model: `python -m converters IN OUT.safetensors`."""

import sys

from converters import foundation

if __name__ == "__main__":
  sys.exit(foundation.main(sys.argv[1:]))
