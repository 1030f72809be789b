"""How a checkpoint says that its model was edited."""

REPLAY_METHOD = "auxin"
"""Our name in the config's `quantization_config`, where transformers lets a model be rewritten before it is loaded."""
