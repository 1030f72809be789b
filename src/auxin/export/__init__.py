"""Forms in which other programs take a model: written by the library that owns the form, and read back to be judged."""

from auxin.export.gguf import GgufReport, export_gguf

__all__ = ["GgufReport", "export_gguf"]
