"""Preflight: what a quantization will give and take, from headers alone, before any work.

prepare (pipeline) -> Target, decisions         what `quantize` itself would lay out
    sizes.py       output bytes by part                        exact
    cache.py       key-value cache by token and context        exact, from the config
    work.py        peak memory, disk and time of quantizing    a bound, and a measurement of a second
    machines.py    tokens/s that memory bandwidth allows       a bound, of published figures
    engines.py     who can load the result, and why not        from names and versions
"""

from .estimate import Preflight, parameters, preflight

__all__ = ["Preflight", "parameters", "preflight"]
