"""GGUF: its header, its metadata, its tokenizer; a model in it."""
