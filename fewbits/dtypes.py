"""The number types of files, by their names in GGUF and safetensors.

name   f32, bf16, f8_e4m3 ...    the lower-case name of safetensors; GGUF's own names are a part of these
torch  torch.float32 ...         looked up at the first access: this module does not import torch
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """One number type. itemsize: bytes of one number. torch_name: its attribute of torch."""

    name: str
    torch_name: str
    itemsize: int

    @cached_property
    def torch(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype

    @property
    def weight(self) -> bool:
        """Whether weights are stored in this type: f32, f16 or bf16."""
        return self.name in ("f32", "f16", "bf16")

    def __str__(self) -> str:
        return self.name


_ROWS = (
    ("f32", "float32", 4), ("f16", "float16", 2), ("bf16", "bfloat16", 2), ("f64", "float64", 8),
    ("f8_e4m3", "float8_e4m3fn", 1), ("f8_e5m2", "float8_e5m2", 1), ("f8_e8m0", "float8_e8m0fnu", 1),
    ("i64", "int64", 8), ("i32", "int32", 4), ("i16", "int16", 2), ("i8", "int8", 1),
    ("u64", "uint64", 8), ("u32", "uint32", 4), ("u16", "uint16", 2), ("u8", "uint8", 1),
    ("bool", "bool", 1),
)  # fmt: skip
DTYPES: dict[str, DType] = {name: DType(name, torch_name, size) for name, torch_name, size in _ROWS}
F32, F16, BF16 = (DTYPES[name] for name in ("f32", "f16", "bf16"))


def dtype_of(dtype: torch.dtype) -> DType:
    """torch's dtype -> DType; KeyError for a type that files do not store."""
    return _BY_TORCH[str(dtype).removeprefix("torch.")]


_BY_TORCH = {row.torch_name: row for row in DTYPES.values()}
