"""The version of this package, stated once in pyproject.toml."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("fewbits")
except PackageNotFoundError:
    VERSION = "0+uninstalled"
