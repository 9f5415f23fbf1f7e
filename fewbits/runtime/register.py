"""Makes transformers know our native directories, without importing it.

transformers has public hooks for quantization methods of others (register_quantization_config and
register_quantizer), but finds nobody by itself: someone has to call them. `import fewbits` is to be enough,
and transformers takes seconds to import, which most uses of fewbits can do without. So:

    import fewbits            puts a finder on sys.meta_path; registers at once if transformers is there
    import transformers ...   its quantizers/auto.py is imported: the finder steps aside for good, lets the
                              usual loader run it, and then imports hf_quantizer.py, whose classes register
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

WATCHED = "transformers.quantizers.auto"


class _Finder(MetaPathFinder):
    """Finds nothing; sees WATCHED being looked for, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        import_module(f"{__package__}.hf_quantizer")
    except ImportError as error:  # another transformers than those that are known
        warnings.warn(
            f"fewbits is not registered in transformers, whose classes have moved ({error}): "
            "from_pretrained does not read native directories; install transformers>=5.23",
            stacklevel=2,
        )


def register() -> None:
    """Let transformers read native directories, now or when it is imported. Done by `import fewbits`."""
    if WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
