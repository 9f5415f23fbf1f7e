"""Structure as data: which weights a model has, what they do, and what GGUF calls them."""
