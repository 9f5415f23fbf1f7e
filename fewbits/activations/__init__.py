"""Quantized activations and caches: schemes, observers, sites that stay in float, integer arithmetic."""

from .kv_cache import CACHES, Cache, attention
from .mixed import LIMIT_DB, Activations, calibrate, sensitive
from .observers import OBSERVERS, Histogram
from .quantizers import SCHEMES, Affine, Quantizer, Scheme, parse, quantize_dequantize

__all__ = [
    "CACHES",
    "LIMIT_DB",
    "OBSERVERS",
    "SCHEMES",
    "Activations",
    "Affine",
    "Cache",
    "Histogram",
    "Quantizer",
    "Scheme",
    "attention",
    "calibrate",
    "parse",
    "quantize_dequantize",
    "sensitive",
]
