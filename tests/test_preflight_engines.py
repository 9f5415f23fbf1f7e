"""Who can load a result, told from names: fused groups of one format, engines and their versions."""

from dataclasses import replace
from itertools import product

import pytest

from fewbits.errors import PlanError
from fewbits.files.open import FILE_TYPES, open_checkpoint
from fewbits.formats import kind_of
from fewbits.model.fused import fused_groups, mixed_groups
from fewbits.model.sites import Site, sites
from fewbits.preflight import engines
from fewbits.preflight.engines import Seen, verdicts
from tests.tiny import save_tiny

# Fused groups


def site(name: str, role: str, group: str, block: int | None = 0, expert: int | None = None) -> Site:
    return Site(name, (32, 32), role, block, group, expert)


def test_fused_groups_of_real_models(tmp_path):
    dense = fused_groups(
        sites(open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path / "dense", num_hidden_layers=1)))
    )
    short = {tuple(name.rsplit(".", 2)[-2] for name in names) for names in dense.values()}
    assert {tuple(sorted(names)) for names in short} == {
        ("k_proj", "q_proj", "v_proj"),
        ("gate_proj", "up_proj"),
    }
    sparse = fused_groups(
        sites(open_checkpoint(save_tiny("MixtralForCausalLM", tmp_path / "moe", num_hidden_layers=1)))
    )
    assert sorted(map(len, sparse.values())) == [3, 4 * 3]


@pytest.mark.parametrize("formats", list(product(("a", "b"), repeat=3)))
def test_a_group_is_mixed_exactly_if_two_formats_meet(formats):
    rows = [site(role, role, "attn:in") for role in "qkv"] + [site("o", "o", "o:in")]
    found = mixed_groups(rows, dict(zip("qkvo", (*formats, "c"), strict=True)))
    assert bool(found) == (len(set(formats)) > 1)
    for mixed in found:
        assert {n: kind for kind, names in mixed.formats.items() for n in names} == dict(
            zip("qkv", formats, strict=True)
        )


# Engines


def kinds(*names):
    return frozenset(map(kind_of, names))


def output(**given) -> Seen:
    base = Seen("gguf", ("llama.cpp",), None, {"model_type": "llama"}, "llama", kinds("q8_0", "f32"))
    if "file" in given:
        given["engines"] = FILE_TYPES.get(given["file"]).engines if given["file"] in FILE_TYPES else ()
    return replace(base, **given)


def verdict(engine: str, version: str | None, **given) -> engines.Verdict:
    return next(v for v in verdicts(output(**given), {engine: version}) if v.engine.lower() == engine)


@pytest.mark.parametrize(
    ("version", "given", "loads"),
    [
        ("b4000", {}, True),
        ("b4000", {"gguf": "qwen3"}, False),
        ("b5100", {"gguf": "qwen3"}, None),
        ("b5220", {"gguf": "qwen3"}, True),
        ("b6000", {"kinds": kinds("mxfp4_ggml")}, False),
        ("b6097", {"kinds": kinds("mxfp4_ggml")}, True),
        ("0.3.8", {"gguf": "qwen3"}, False),
        ("0.3.36", {"gguf": "qwen3"}, True),
        ("b9999", {"file": "native"}, False),
        ("b9999", {"gguf": None}, None),
    ],
)
def test_llamacpp_by_version(version, given, loads):
    found = verdict("llama.cpp", version, **given)
    assert (found.loads, found.version) == (loads, version) and found.why


@pytest.mark.parametrize(
    ("given", "loads", "why"),
    [
        ({}, True, "to float"),
        ({"gguf": "unheard"}, False, "unheard"),
        ({"config": {"model_type": "unheard"}}, False, "'unheard'"),
        ({"file": "native", "kinds": kinds("f32")}, True, "in float"),
        ({"file": "native"}, False, "native"),
        ({"file": "x", "method": "unheard"}, False, "'unheard'"),
    ],
)
def test_transformers_is_asked(given, loads, why):
    found = verdict("transformers", None, **given)
    assert found.loads is loads and why in found.why and found.installed
    assert verdict("transformers", "1.2.3", **given).loads is None


@pytest.mark.parametrize("present", [True, False])
def test_transformers_names_the_packages_it_lacks(monkeypatch, present):
    real = engines.installed
    monkeypatch.setattr(engines, "installed", lambda name: real(name) or ("1" if present else None))
    found = verdict("transformers", None, file="gptq", method="gptq")
    packages = {"optimum", "gptqmodel", "accelerate"}
    assert found.loads is (present or all(map(real, packages)))
    assert found.loads or "pip install" in found.why


def test_vllm_wants_its_file_types_and_equal_groups():
    mixed = mixed_groups([site("q", "q", "a:in"), site("k", "k", "a:in")], {"q": "x", "k": "y"})
    gptq = {"file": "gptq", "method": "gptq", "kinds": kinds("int4_g64", "bf16")}
    assert verdict("vllm", "0.33", **gptq).loads is None
    assert verdict("vllm", "0.33", file="native").loads is False
    refused = verdict("vllm", "0.33", **gptq, mixed=mixed)
    assert refused.loads is False and "a (attention)" in refused.why


@pytest.mark.parametrize("kind", ["int3_g64", "int4_g64_asym", "int4_g64_actorder"])
def test_vllm_lacks_some_formats_of_a_file_type(kind):
    given = {"file": "gptq_v2", "method": "gptq", "kinds": kinds(kind, "bf16")}
    found = verdict("vllm", "0.33.0", **given)
    assert found.loads is False and f"has no {kind} in gptq files" in found.why
    assert verdict("vllm", "0.9", **given).loads is None


def test_engines_that_are_not_there(monkeypatch):
    monkeypatch.setattr(engines, "installed", lambda package: None)
    for found in verdicts(output(), {}):
        assert not found.installed and found.version is None and found.loads is not True
    with pytest.raises(PlanError, match=r"unknown engine 'x'; known: llama\.cpp"):
        verdicts(output(), {"x": None})
