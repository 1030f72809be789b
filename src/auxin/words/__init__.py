"""The words that all rooms speak: widths, roles of parameters, anatomies, paths, and things called by name."""
