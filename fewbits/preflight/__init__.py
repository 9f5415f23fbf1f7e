"""Preflight: size, memory, time and engines of a quantization, from headers alone.

prepare (pipeline) -> Target, decisions         the layout that `quantize` would write
    sizes.py       output bytes by part                        exact
    cache.py       KV cache by token and context               exact, from the config
    work.py        peak memory, disk and time of quantizing    a bound, and a measurement of about a second
    machines.py    tokens/s that memory bandwidth allows       a bound, from published figures
    engines.py     which engines load the result               from names and versions
"""

from .estimate import Preflight, parameters, preflight

__all__ = ["Preflight", "parameters", "preflight"]
