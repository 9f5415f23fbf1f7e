"""An encoder in onnxruntime and in torch.ao, for `bench/encoder` and `bench/classifier`."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# onnxruntime's dynamic quantization: as it is, and what its documents advise for processors without VNNI.
THEIRS: dict[str, dict[str, Any]] = {
    "onnxruntime": {},
    "onnxruntime, 7 bits": {"per_channel": True, "reduce_range": True},
}


class InOnnxruntime:
    """A model.onnx, called as a transformers model is: its first output is both fields that one may have."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, **given: torch.Tensor) -> SimpleNamespace:
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
        fed = {each.name: given[each.name].numpy() for each in self.session.get_inputs()}
        out = torch.from_numpy(self.session.run(None, fed)[0])
        return SimpleNamespace(last_hidden_state=out, logits=out)


def nbytes_of(graph: Path) -> int:
    """A model.onnx and its data beside it."""
    return sum(path.stat().st_size for path in (graph, Path(f"{graph}.data")) if path.exists())


def by_onnxruntime(graph: Path, folder: Path, **settings: Any) -> Path:
    """onnxruntime's dynamic quantization of a model.onnx, its weights first stored as MatMul reads them."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    whole, folded, out = (folder / f"{name}.onnx" for name in ("whole", "folded", "theirs"))
    onnx.save(onnx.load(graph), whole)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath, options.log_severity_level = str(folded), 3
    onnxruntime.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
    quantize_dynamic(folded, out, op_types_to_quantize=["MatMul"], **settings)
    return out


def by_torch(model: Any) -> tuple[Any, int]:
    """torch.ao's dynamic quantization of a model, and the bytes of its state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    saved = io.BytesIO()
    torch.save(quantized.state_dict(), saved)
    return quantized, saved.tell()


@contextmanager
def folder_or(kept: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = kept or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
