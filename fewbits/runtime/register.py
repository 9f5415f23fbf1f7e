"""Makes transformers know our native directories.

transformers has public hooks for quantization methods of others (register_quantization_config and
register_quantizer), but finds nobody by itself: `fewbits.register()`, or `import fewbits.transformers`, says
so.
"""

from __future__ import annotations

from importlib import import_module

from ..errors import ModelError


def register() -> None:
    """Let transformers read and write native directories: quant_method "fewbits". Imports transformers.

    ModelError for a transformers whose hooks are not where they were.
    """
    try:
        import_module(f"{__package__}.hf_quantizer")
    except ImportError as error:
        raise ModelError(
            f"fewbits cannot be registered in transformers, whose classes have moved ({error}): install "
            "transformers>=5.23"
        ) from error
