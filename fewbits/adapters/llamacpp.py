"""llama.cpp through llama-cpp-python, for verification, tests and benchmarks.

Only its C API is used, and its log is suppressed. KernelError if the package is not installed or the engine
refuses a file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..errors import KernelError

_log: list[str] = []
_callbacks: list[Any] = []


@cache
def _library() -> ModuleType:
    """llama_cpp's C API, its log diverted to `_log`; KernelError when it is not installed."""
    try:
        from llama_cpp import llama_cpp as api
    except ImportError as error:
        raise KernelError(
            "llama-cpp-python is not installed; `pip install 'fewbits[engine]'` builds it in some minutes"
        ) from error

    @api.llama_log_callback
    def keep(level: int, message: bytes, _data: object) -> None:
        if level >= 3:  # warnings and errors
            _log.append(message.decode(errors="replace").strip())
        del _log[:-20]

    api.llama_log_set(keep, ctypes.c_void_p(0))
    _callbacks.append(keep)  # the C side holds a bare pointer to it
    api.llama_backend_init()
    return api


def _fail(what: str) -> KernelError:
    return KernelError(f"llama.cpp: {what}: {'; '.join(_log[-5:]) or 'it gives no reason'}")


@contextmanager
def _model(path: Path, vocab_only: bool = False) -> Iterator[Any]:
    api = _library()
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    params.vocab_only = vocab_only
    _log.clear()
    model = api.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise _fail(f"cannot load {path}")
    try:
        yield model
    finally:
        api.llama_model_free(model)


def engine_logits(path: Path, tokens: Sequence[int] | torch.Tensor, threads: int = 1) -> torch.Tensor:
    """Logits of every position of one sequence -> `(t, vocab)` f32; cache in f32, no flash attention."""
    api = _library()
    ids = [int(token) for token in tokens]
    with _model(path) as model:
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = len(ids)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = api.llama_init_from_model(model, params)
        if not context:
            raise _fail(f"cannot make a context of {len(ids)} tokens for {path}")
        try:
            return _decode(api, context, ids, api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))
        finally:
            api.llama_free(context)


def _decode(api: ModuleType, context: Any, ids: list[int], vocab: int) -> torch.Tensor:
    batch = api.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place] = token
            batch.pos[place] = place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = True
        status = api.llama_decode(context, batch)
        if status != 0:
            raise _fail(f"decoding {len(ids)} tokens failed with {status}")
        flat = np.ctypeslib.as_array(api.llama_get_logits(context), shape=(len(ids) * vocab,))
        return torch.from_numpy(flat.copy()).view(len(ids), vocab)
    finally:
        api.llama_batch_free(batch)


def engine_tokenize(
    path: Path, text: str, add_special: bool = False, parse_special: bool = False
) -> list[int]:
    """Text -> ids, by the engine's tokenizer of that file."""
    api = _library()
    raw = text.encode()
    with _model(path, vocab_only=True) as model:
        room = len(raw) + 8  # a token has at least a byte, except for BOS, EOS and a leading space
        ids = (api.llama_token * room)()
        vocab = api.llama_model_get_vocab(model)
        count = api.llama_tokenize(vocab, raw, len(raw), ids, room, add_special, parse_special)
        if count < 0:
            raise _fail(f"tokenizing {len(raw)} bytes needs {-count} ids, more than {room}")
        return list(ids[:count])


def engine_quantize(
    src: Path,
    dst: Path,
    ftype: int,
    threads: int = 1,
    imatrix: Mapping[str, np.ndarray] | None = None,
    pure: bool = False,
) -> None:
    """A float GGUF -> a quantized one, by llama.cpp itself.

    ftype: its LLAMA_FTYPE number (`general.file_type`). imatrix: GGUF name -> (k,) f32 importances.
    """
    api = _library()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = ftype, threads, pure
    data, kept = _imatrix(api, imatrix or {})
    if imatrix:
        params.imatrix = data
    _log.clear()
    status = api.llama_model_quantize(str(src).encode(), str(dst).encode(), ctypes.byref(params))
    del kept
    if status != 0:
        raise _fail(f"quantizing {src} to file type {ftype} failed with {status}")


def _imatrix(api: ModuleType, imatrix: Mapping[str, np.ndarray]) -> tuple[Any, list[np.ndarray]]:
    """The engine's array of (name, data, size), ended by a row without a name; and its buffers."""
    rows = (api.llama_model_imatrix_data * (len(imatrix) + 1))()
    kept = [np.ascontiguousarray(values, dtype=np.float32) for values in imatrix.values()]
    for row, name, values in zip(rows, imatrix, kept, strict=False):
        row.name = name.encode()
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        row.size = values.size
    return rows, kept
