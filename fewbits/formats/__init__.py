"""Number formats, one family per module; importing this package registers all of them."""

from . import actorder, affine, codebook, floats, ggml, iq
from .base import FORMATS, Distortion, Format, Grid, Kind, kind_of

__all__ = [
    "FORMATS",
    "Distortion",
    "Format",
    "Grid",
    "Kind",
    "actorder",
    "affine",
    "codebook",
    "floats",
    "ggml",
    "iq",
    "kind_of",
]  # fmt: skip
