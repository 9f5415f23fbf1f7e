"""Encoders in their engines: as ONNX in onnxruntime on the CPU (`pip install 'fewbits[onnx]'`), against
transformers with the decoded weights and onnxruntime's own quantizer; native ones, as `verify` runs them.

Both multiply in f32 and sum in another order: 8e-7 of the largest number was measured with inputs in float
(onnxruntime 1.32), SAME is 1e-5. With inputs in 8 bits one that lies between two codes may be rounded to
either: 1.2e-2 at most was measured, on random weights; ROUNDED is 3e-2, and the rounding itself moves the
output by more.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.adapters.as_loaded import as_loaded
from fewbits.adapters.transformers import load_model
from fewbits.cli.main import main
from fewbits.errors import PlanError
from fewbits.evaluation.simulated import Simulation, simulated
from fewbits.files.open import open_checkpoint
from fewbits.plan import Plan, Rule
from tests.encoders import ENCODERS, save_encoder

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.engine

SAME, ROUNDED = 1e-5, 3e-2
DYNAMIC = {"to": "int8_channel", "activations": "int8_dynamic"}
GIVEN = {"effort": "fast", "verify": False}


def inputs():
    ids = torch.randint(5, 300, (3, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[0, 9:], mask[0, 9:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def ran(path):
    """name of an output -> its values for `inputs`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {name: value.numpy() for name, value in inputs().items()}
    fed = {each.name: given.get(each.name, np.zeros((3, 13), np.int64)) for each in session.get_inputs()}
    names = [each.name for each in session.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(names, session.run(names, fed), strict=True)}


def expected(path, simulation=None):
    checkpoint = open_checkpoint(path)
    model, simulation = load_model(checkpoint), simulation or Simulation().of(checkpoint.metadata)
    with torch.no_grad(), simulated(model, simulation):
        return model(**inputs())


def apart(found, wanted):
    """The largest difference of tokens that are not padding, in parts of the largest number."""
    if found.ndim == 3:
        kept = inputs()["attention_mask"].bool()
        found, wanted = found[kept], wanted[kept]
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", ENCODERS)
def test_dynamic_int8_is_transformers_with_rounded_inputs(tmp_path, name):
    source, out = save_encoder(name, tmp_path / "source"), tmp_path / "out"
    fewbits.quantize(source, out, file="onnx", **DYNAMIC, **GIVEN)
    found, wanted = ran(out / "model.onnx"), expected(out)
    floats = expected(out, Simulation())
    assert found.keys() <= wanted.keys()
    for key, value in found.items():
        moved = apart(floats[key], wanted[key])
        assert apart(value, wanted[key]) < min(ROUNDED, moved)


@pytest.mark.parametrize(
    "to", ["int4_g32", "int4_g32_asym", "int8_g32", "int8_channel", "int8_tensor", "bf16"]
)
def test_weights_alone_are_transformers_with_the_decoded_weights(tmp_path, to):
    source, out = save_encoder("BertModel", tmp_path / "source"), tmp_path / "out"
    if to == "bf16":
        fewbits.convert(save_encoder("BertModel", tmp_path / "b", dtype="bfloat16"), out, "onnx")
    else:
        fewbits.quantize(source, out, to=to, file="onnx", **GIVEN)
    found, wanted = ran(out / "model.onnx"), expected(out)
    assert found.keys() == {"last_hidden_state", "pooler_output"}
    for key, value in found.items():
        assert apart(value, wanted[key]) < SAME


def test_smaller_error_than_onnxruntimes_own_quantizer(tmp_path):
    """Over four models: of a single one, three texts' classes are too few to tell."""
    from onnxruntime.quantization import quantize_dynamic

    errors = {"ours": 0.0, "theirs": 0.0}
    for seed in range(4):
        folder = tmp_path / str(seed)
        source = save_encoder("DistilBertForSequenceClassification", folder / "source", seed=seed)
        wanted = expected(source)["logits"]
        fewbits.convert(source, folder / "float", "onnx")
        onnx.save(onnx.load(folder / "float/model.onnx"), folder / "whole.onnx")
        options = ort.SessionOptions()  # it quantizes weights that are stored as MatMul reads them
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath, options.log_severity_level = str(folder / "folded.onnx"), 3
        ort.InferenceSession(folder / "whole.onnx", options, providers=["CPUExecutionProvider"])
        quantize_dynamic(folder / "folded.onnx", folder / "theirs.onnx", op_types_to_quantize=["MatMul"])
        fewbits.quantize(source, folder / "ours", file="onnx", **DYNAMIC, **GIVEN)
        for name, file in (("ours", "ours/model.onnx"), ("theirs", "theirs.onnx")):
            errors[name] += float((ran(folder / file)["logits"] - wanted).square().sum())
    assert 0 < errors["ours"] < errors["theirs"], errors


def test_one_command_and_its_verification(tmp_path, capsys):
    source = save_encoder("DistilBertForSequenceClassification", tmp_path / "source")
    words = "--to int8_channel --activations int8_dynamic --file onnx --effort fast --json --out"
    assert main(["quantize", str(source), *words.split(), str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)["verified"]
    assert (found["engine"], found["verdict"]) == ("onnxruntime", "same")
    assert found["reference"]["verdict"] == "same"
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "native"), "--to", "native"]) == 0
    one, two = (open_checkpoint(tmp_path / name).metadata["activations"] for name in ("out", "native"))
    assert one == two


def test_buffers_of_older_files_are_kept(tmp_path):
    source, out = save_encoder("BertModel", tmp_path / "source"), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(130)[None]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    fewbits.convert(source, out, "onnx")
    assert torch.equal(
        open_checkpoint(out).tensors["embeddings.position_ids"].load(), torch.arange(130)[None]
    )
    assert apart(ran(out / "model.onnx")["last_hidden_state"], expected(out)["last_hidden_state"]) < SAME


def test_a_weight_in_float_has_its_input_in_float(tmp_path):
    source, out = save_encoder("BertModel", tmp_path / "source"), tmp_path / "out"
    kept = "encoder.layer.1.output.dense.weight"
    fewbits.quantize(source, out, file="onnx", plan=Plan((Rule(kept, "f32"),)), **DYNAMIC, **GIVEN)
    assert open_checkpoint(out).metadata["activations"] == {"scheme": "int8_dynamic", "left": [kept]}
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("MatMulInteger") == 11
    assert apart(ran(out / "model.onnx")["last_hidden_state"], expected(out)["last_hidden_state"]) < ROUNDED


def test_inputs_in_8_bits_need_weights_in_8_bits(tmp_path):
    source = save_encoder("BertModel", tmp_path / "source")
    with pytest.raises(PlanError, match=r"is int4_g32; only int8_channel and int8_tensor"):
        fewbits.quantize(
            source, tmp_path / "o", file="onnx", to="int4_g32", activations="int8_dynamic", **GIVEN
        )
    with pytest.raises(PlanError, match="in int8_dynamic, not in fp8_dynamic"):
        fewbits.quantize(
            source, tmp_path / "o", file="onnx", to="int8_channel", activations="fp8_dynamic", **GIVEN
        )


@pytest.mark.parametrize("name", ["DistilBertForSequenceClassification", "BertForMaskedLM", "BertModel"])
def test_native_output_is_verified_in_transformers(tmp_path, name):
    source, out = save_encoder(name, tmp_path / "source"), tmp_path / "out"
    fewbits.quantize(source, out, to="int4_g32", **GIVEN)
    found = fewbits.verify(out, reference=as_loaded(open_checkpoint(source)))
    assert (found.verdict, found.greedy, found.reference.verdict) == ("same", None, "same")
    assert found.kl < 1e-9 < found.loss
    assert found.measure == ("1 - cosine" if name == "BertModel" else "KL divergence")
