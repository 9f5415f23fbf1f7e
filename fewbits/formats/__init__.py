"""What do the bits mean? One module a family; importing this package registers every format."""

from . import actorder, affine, codebook, floats, ggml, iq
from .base import FLOATS, FORMATS, Distortion, Format, Grid

__all__ = [
    "FLOATS", "FORMATS", "Distortion", "Format", "Grid",
    "actorder", "affine", "codebook", "floats", "ggml", "iq",
]  # fmt: skip
