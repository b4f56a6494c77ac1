"""Public building blocks of networks: basic layers, shared blocks, operations, windows."""
