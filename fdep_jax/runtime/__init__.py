"""Services around the computation: devices, files, signals, logs, compiled modules."""
