"""Large packages, imported when something of them is first used.

    from ..lazy import torch        torch is not loaded yet
    torch.arange(3)                 now it is

torch and gguf take a second or two to import, which is longer than listing formats or reading a header takes.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule(ModuleType):
    """A module that imports the package of its name at the first access to an attribute.

    Each attribute is looked up in the package once, and then is this module's own: as fast as the package's.
    """

    def __getattr__(self, name: str) -> Any:
        value = getattr(import_module(self.__name__), name)
        setattr(self, name, value)
        return value


if TYPE_CHECKING:
    import gguf as gguf
    import torch as torch
else:
    gguf = LazyModule("gguf")
    torch = LazyModule("torch")
