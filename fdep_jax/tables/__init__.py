"""Tables of experiments: their rows, the sweep that runs them, and what is made of the results."""
