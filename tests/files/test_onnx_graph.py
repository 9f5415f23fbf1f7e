"""The graph of an ONNX directory, in the reference evaluator of the onnx package: no engine is needed.

In f32 1.1e-6 of the largest logit at most was measured between it and transformers, SAME is 1e-5.
"""

import itertools
import json

import numpy as np
import pytest
import torch

from fewbits.adapters.transformers import load_model
from fewbits.files.onnx.decoder import MODELS, decoder_of, genai_config
from fewbits.files.open import open_checkpoint
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.files.directories import ONE_BLOCK, kinds, one_block, write_directory
from tests.tiny import save_tiny

onnx = pytest.importorskip("onnx")
SAME = 1e-5
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def directory(tmp_path):
    return write_directory(tmp_path / "m", "onnx", one_block({}), ONE_BLOCK)


def signature(infos):
    """name -> element type, axes: a size or a name."""
    return {
        info.name: (
            onnx.TensorProto.DataType.Name(info.type.tensor_type.elem_type),
            *(axis.dim_param or axis.dim_value for axis in info.type.tensor_type.shape.dim),
        )
        for info in infos
    }


def test_inputs_and_outputs_are_those_of_a_decoder_with_a_cache(directory):
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    past, present = (("FLOAT", "batch_size", 4, f"{part}_sequence_length", 64) for part in ("past", "total"))
    assert signature(graph.input) == {
        "input_ids": ("INT64", "batch_size", "sequence_length"),
        "attention_mask": ("INT64", "batch_size", "total_sequence_length"),
        "position_ids": ("INT64", "batch_size", "sequence_length"),
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
    }
    assert list(signature(graph.output).items()) == [
        ("logits", ("FLOAT", "batch_size", "sequence_length", 8)),
        ("present.0.key", present),
        ("present.0.value", present),
    ]


class Reference:
    """The graph in the onnx package's evaluator, and its past."""

    def __init__(self, path):
        from onnx.reference import ReferenceEvaluator

        model = onnx.load(path / "model.onnx")
        self.evaluator = ReferenceEvaluator(model)
        self.past = {
            name: np.zeros([0 if isinstance(axis, str) else axis for axis in axes], np.float32)
            for name, (_, *axes) in signature(model.graph.input).items()
            if name.startswith("past_key_values.")
        }

    def __call__(self, ids, mask):
        """Logits of `ids` `(b, t)`, the last of those that `mask` `(b, past + t)` speaks of."""
        if self.past["past_key_values.0.key"].shape[0] == 0:
            self.past = {name: np.zeros((len(ids), *x.shape[1:]), "f4") for name, x in self.past.items()}
        places = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        logits, *present = self.evaluator.run(None, given | self.past)
        self.past = dict(zip(self.past, present, strict=True))
        return logits


WINDOWS = {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}
GRAPHS = [
    ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}),
    ("MistralForCausalLM", {"sliding_window": 5}),
    ("Qwen2ForCausalLM", WINDOWS | {"use_sliding_window": True}),
    ("Qwen3ForCausalLM", WINDOWS | {"use_sliding_window": True, "head_dim": 16}),
]


@pytest.mark.parametrize(("name", "given"), GRAPHS)
def test_the_graph_is_the_model_whole_in_steps_and_in_a_padded_batch(tmp_path, name, given):
    source = save_tiny(name, tmp_path / "source", **TINY | given)
    quantize(source, tmp_path / "out", Request(to="f32", file="onnx"))
    model = load_model(open_checkpoint(tmp_path / "out"))
    ids, short, pads = np.arange(10, 26)[None], np.arange(60, 69)[None], 7
    with torch.no_grad():
        ours, ours_short = (model(torch.from_numpy(row)).logits.numpy() for row in (ids, short))

    def apart(theirs, ours):
        return np.abs(theirs - ours).max() / np.abs(ours).max()

    assert apart(Reference(tmp_path / "out")(ids, np.ones_like(ids)), ours) < SAME
    cached, cuts = Reference(tmp_path / "out"), (0, 6, 9, 10, 11, 12, 13, 14, 15, 16)
    parts = [cached(ids[:, i:j], np.ones_like(ids[:, :j])) for i, j in itertools.pairwise(cuts)]
    assert apart(np.concatenate(parts, 1), ours) < SAME
    batch = np.concatenate([ids, np.pad(short, ((0, 0), (pads, 0)))])
    mask = np.ones_like(batch)
    mask[1, :pads] = 0
    padded = Reference(tmp_path / "out")
    parts = [padded(batch[:, i:j], mask[:, :j]) for i, j in itertools.pairwise(cuts)]
    found = np.concatenate(parts, 1)
    assert np.isfinite(found).all()
    assert apart(found[:1], ours) < SAME and apart(found[1:, pads:], ours_short) < SAME
    seen = Reference(tmp_path / "out")(batch, np.ones_like(mask))
    assert apart(seen[1:, pads:], ours_short) > 1000 * SAME  # the mask, and the positions made of it


def test_genai_config_names_what_the_graph_has(directory):
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    model = json.loads((directory / "genai_config.json").read_text())["model"]
    decoder = model["decoder"]
    assert {name.replace("%d", "0") for name in decoder["inputs"].values()} == set(signature(graph.input))
    assert {name.replace("%d", "0") for name in decoder["outputs"].values()} == set(signature(graph.output))
    assert (directory / decoder["filename"]).is_file()
    sizes = ("head_size", "num_key_value_heads", "num_attention_heads", "num_hidden_layers", "hidden_size")
    assert [decoder[key] for key in sizes] == [64, 4, 4, 1, 64]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("llama", 8, 2048)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, {}),
        ({"eos_token_id": None, "pad_token_id": -1, "bos_token_id": 1}, {"bos_token_id": 1}),
        ({"eos_token_id": 2}, {"eos_token_id": 2, "pad_token_id": 2}),
        ({"eos_token_id": [5, 3], "pad_token_id": 0}, {"eos_token_id": [5, 3], "pad_token_id": 0}),
        ({"eos_token_id": ["</s>", True]}, {}),
    ],
)
def test_special_tokens_of_genai_config(given, said):
    model = genai_config(ONE_BLOCK | given, kinds(one_block({})), "model.onnx")["model"]
    assert {key: value for key, value in model.items() if key.endswith("_token_id")} == said


@pytest.mark.parametrize("kind", MODELS)
def test_a_context_that_no_config_names_is_transformers_own(kind):
    from transformers import AutoConfig

    told = AutoConfig.for_model(kind).max_position_embeddings
    assert decoder_of(ONE_BLOCK | {"model_type": kind}).context == told
    assert decoder_of(ONE_BLOCK | {"model_type": kind, "max_position_embeddings": 9}).context == 9
