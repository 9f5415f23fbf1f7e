"""Entropy coding of model files: the same bytes in fewer, for download and disk."""

from .coders import CODERS
from .container import Place, pack
from .reader import open_packed, unpack
from .streams import layout_of

__all__ = ["CODERS", "Place", "layout_of", "open_packed", "pack", "unpack"]
