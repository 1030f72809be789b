"""The words that all rooms speak: roles of parameters, dotted paths, and things that are called by name."""
