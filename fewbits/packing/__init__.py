"""Entropy coding of model files: the same bytes in fewer, for download and disk."""

from .container import pack_file, unpack_file

__all__ = ["pack_file", "unpack_file"]
