"""What a run needs around its computation: devices, files, signals, logs, compiled modules."""
