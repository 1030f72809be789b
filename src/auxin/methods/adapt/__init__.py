"""Methods that adapt a model to other data without changing what it is."""
