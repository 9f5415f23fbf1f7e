"""Durable bytes: streamed files, atomic small files, mapped arrays, JSON, safetensors."""
