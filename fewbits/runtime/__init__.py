"""What runs a model: packed modules, loading, the hooks in transformers."""
