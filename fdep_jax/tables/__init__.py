"""Tables of experiments: rows, the sweep that runs them, result tables and figures."""
