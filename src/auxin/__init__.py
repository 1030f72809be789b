"""Auxin changes the size of a transformer without starting over."""
