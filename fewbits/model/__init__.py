"""Model structure as data: the weights of a model, their roles, and their names in GGUF."""
