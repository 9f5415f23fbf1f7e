"""The lattice types against llama.cpp's own search: the same weights, the same importances."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fewbits.adapters.llamacpp import engine_quantize
from fewbits.files.open import open_checkpoint
from fewbits.formats.base import FORMATS
from fewbits.formats.iq import IQ_TYPES
from fewbits.plan.mixtures import RECIPES
from tests.tiny import read_by_gguf, save_tiny, write_float_gguf

pytestmark = pytest.mark.engine

RECIPE = {"iq2_s": "iq2_m"}  # the file types whose default these types are


@pytest.mark.parametrize("name", [fmt.name for fmt in IQ_TYPES])
def test_weighted_error_is_below_that_of_llama_cpp(name: str, tmp_path: Path) -> None:
    source = write_float_gguf(
        open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path / "s")), tmp_path / "f.gguf"
    )
    weights = {key: w for key, (_, w, _) in read_by_gguf(source).items() if w.ndim == 2}
    rng = np.random.default_rng(0)
    imatrix = {key: np.exp(rng.standard_normal(w.shape[1])).astype(np.float32) for key, w in weights.items()}
    file_type = RECIPES[RECIPE.get(name, name)].file_type
    engine_quantize(source, tmp_path / "q.gguf", file_type, imatrix=imatrix, pure=True)
    ours, theirs, seen = 0.0, 0.0, 0
    for key, (kind, decoded, _) in read_by_gguf(tmp_path / "q.gguf").items():
        if kind != name:
            continue
        importance = torch.from_numpy(imatrix[key])
        mine = FORMATS.get(name).encode(weights[key], importance).decode()
        both = ((got - weights[key]).square() @ importance for got in (mine, decoded))
        ours, theirs = (total + float(part.sum()) for total, part in zip((ours, theirs), both, strict=True))
        seen += 1
    assert seen > 1
    assert ours < theirs
