"""Methods that make a model bigger."""
