"""GGUF: its header, its metadata, its tokenizer, and models in it."""
