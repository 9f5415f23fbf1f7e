"""Large packages, imported at the first use.

    from ..lazy import torch        torch is not loaded yet
    torch.arange(3)                 now it is

torch and gguf take a second or two to import, which is longer than listing formats or reading a header takes.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


def lazy_module(name: str) -> ModuleType:
    """A module that imports the package `name` at the first access to an attribute.

    Each attribute is looked up in the package once and then belongs to this module, which makes it as fast as
    the package's own: a module's `__getattr__` (PEP 562) is called for missing attributes only.
    """
    module = ModuleType(name)

    def look_up(attribute: str) -> Any:
        value = getattr(import_module(name), attribute)
        setattr(module, attribute, value)
        return value

    vars(module)["__getattr__"] = look_up
    return module


if TYPE_CHECKING:
    import gguf as gguf
    import torch as torch
else:
    gguf = lazy_module("gguf")
    torch = lazy_module("torch")
