"""Recipes against llama.cpp itself: it quantizes tiny files, and each tensor's type must be ours."""

import ctypes
import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from fewbits.plan.mixtures import RECIPES
from fewbits.plan.recipes import Choice, choose_types, needing_imatrix
from tests.recipe_cases import CASES, summarize

pytestmark = pytest.mark.engine
GOLDEN = Path(__file__).parent.parent / "golden" / "recipes.json"
OVERRIDE = {"name": "blk.1.attn_v.weight", "type": "q8_0"}


def write_model(path, hyper, tensors):
    writer = gguf.GGUFWriter(path, hyper.arch)
    writer.add_context_length(64)
    writer.add_embedding_length(64 * hyper.n_head)
    writer.add_block_count(hyper.n_layer)
    writer.add_feed_forward_length(256)
    writer.add_head_count(hyper.n_head)
    writer.add_head_count_kv(hyper.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_vocab_size(2)
    writer.add_tokenizer_model("no_vocab")
    if hyper.n_expert:
        writer.add_expert_count(hyper.n_expert)
        writer.add_expert_used_count(2)
    random = np.random.default_rng(0)
    for name, shape, _ in tensors:
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def imatrix_of(llama_cpp, tensors):
    """Importance one for every column, and the arrays that must outlive the call."""
    entries = []
    for name, shape, _ in tensors:
        size = shape[-1] * (shape[0] if len(shape) == 3 else 1)
        entries.append((name.encode(), (ctypes.c_float * size)(*[1.0] * size), size))
    data = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))()
    for slot, (name, values, size) in zip(data, entries, strict=False):
        slot.name, slot.data, slot.size = name, ctypes.cast(values, ctypes.POINTER(ctypes.c_float)), size
    return data, entries


def engine_types(source, target, recipe, imatrix=None, override=None):
    """{name: type} of the file that llama.cpp writes; None if it refuses."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = RECIPES[recipe].file_type, 1
    if imatrix is not None:
        params.imatrix = imatrix
    if override:
        patterns = (llama_cpp.llama_model_tensor_override * 2)()
        patterns[0].pattern = override["name"].encode()
        patterns[0].type = gguf.GGMLQuantizationType[override["type"].upper()]
        params.tt_overrides = patterns
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) != 0:
        return None
    reader = gguf.GGUFReader(target)
    assert reader.get_field("general.file_type").contents() == RECIPES[recipe].file_type
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}


def types_of(choices: dict[str, Choice]) -> dict[str, str]:
    return {name: choice.type for name, choice in choices.items()}


@pytest.fixture(autouse=True)
def quiet():
    import llama_cpp

    @llama_cpp.llama_log_callback
    def ignore(level, text, data):
        pass

    llama_cpp.llama_log_set(ignore, None)
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), None)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_the_type_that_llama_quantize_gives(case, tmp_path):
    import llama_cpp

    hyper, tensors = CASES[case]
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    write_model(source, hyper, tensors)
    imatrix, alive = imatrix_of(llama_cpp, tensors)
    golden = {}
    for recipe in dict.fromkeys(r.name for r in RECIPES.values()):
        for suffix, data in (("", None), ("+imatrix", imatrix)):
            ours = choose_types(recipe, tensors, hyper, has_imatrix=data is not None)
            theirs = engine_types(source, target, recipe, data)
            if data is None and needing_imatrix(recipe, {name: choice.type for name, choice in ours.items()}):
                assert theirs is None, f"{recipe}: llama.cpp needs no imatrix here"
                continue
            assert theirs == types_of(ours), f"{recipe}{suffix}"
            golden[recipe + suffix] = summarize(theirs)
    assert len(alive) == len(tensors)
    if os.environ.get("FEWBITS_UPDATE_GOLDEN") == "1":
        table = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        table[case] = golden
        GOLDEN.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("recipe", ["q4_k_m", "q3_k_m", "q5_k_m"])
def test_an_override_changes_the_others_as_in_llama_quantize(recipe, tmp_path):
    hyper, tensors = CASES["llama"]
    write_model(tmp_path / "source.gguf", hyper, tensors)
    theirs = engine_types(tmp_path / "source.gguf", tmp_path / "target.gguf", recipe, override=OVERRIDE)
    ours = choose_types(
        recipe, tensors, hyper, overrides=lambda name: OVERRIDE["type"] if name == OVERRIDE["name"] else None
    )
    assert theirs == types_of(ours)
