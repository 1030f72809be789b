"""Methods that make a model smaller."""
