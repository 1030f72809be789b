"""Methods that make a model smaller by leaving out parts of it."""
