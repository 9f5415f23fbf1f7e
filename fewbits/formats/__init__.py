"""What do the bits mean? One module a family; importing this registers every format."""

from . import affine, codebook, floats, ggml
from .base import FORMATS, Format, Grid

__all__ = ["FORMATS", "Format", "Grid", "affine", "codebook", "floats", "ggml"]
