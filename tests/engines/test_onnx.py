"""ONNX directories in onnxruntime on the CPU, against our own forward: `pip install 'fewbits[onnx]'`.

Both multiply in f32 and sum in another order: 2.8e-6 of the largest logit at most was measured (onnxruntime
1.32), SAME is 1e-5. A DequantizeLinear with zeros is fused by onnxruntime into a product with inputs of 8
bits, in seven weights of each of two blocks: 0.026 to 0.040 of the largest logit was measured on five models,
ROUNDED is 0.1. With accuracy level 0 it rounds no input and differs by no more than the others.

onnxruntime-genai runs the same directory by its genai_config.json, where it is installed.
"""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from fewbits.adapters.transformers import load_model
from fewbits.files.open import open_checkpoint
from fewbits.plan import Plan, Rule
from fewbits.release.verify import NEW, verify
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests import tiny
from tests.tiny import save_tiny

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.engine

TOKENS = torch.arange(10, 31)[None]
SAME, ROUNDED = 1e-5, 0.1
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 8,
           "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
MODELS = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "short": ("LlamaForCausalLM", {"hidden_size": 96, "intermediate_size": 176}),  # last groups are not whole
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_windows": ("Qwen2ForCausalLM", WINDOWS),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_windows": ("Qwen3ForCausalLM", WINDOWS),
}
FORMATS = ["int4_g32", "int4_g32_asym", "int8_g32", "int8_channel"]
CASES = [(model, kind) for model in ("llama", "qwen3") for kind in FORMATS]
CASES += [("llama3", "int4_g128"), ("short", "int4_g64_asym"), ("short", "int8_g256_asym"), ("short", "bf16")]
CASES += [
    ("mistral", "int8_tensor"),
    ("mistral", "int4_g16"),
    ("qwen2", "int4_g64_bf16"),
    ("qwen2", "int8_g32"),
    ("qwen2_windows", "int4_g32"),
]


def written(tmp_path, model, kind, *rules):
    name, given = MODELS[model]
    source = save_tiny(name, tmp_path / "source", **given)
    plan = Plan(tuple(Rule(match, to) for match, to in rules))
    quantize(source, tmp_path / "out", Request(to=kind, file="onnx", plan=plan))
    return tmp_path / "out"


class Session:
    """The graph in onnxruntime. A call takes tokens `(b, t)` and the mask `(b, past + t)` of all; the logits
    of those tokens come back, and their keys and values go to the next call."""

    def __init__(self, path, **entries):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        for key, value in entries.items():
            options.add_session_config_entry(f"session.{key}", value)
        graph = path / "model.onnx"
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.past = {}

    def __call__(self, ids, mask=None):
        mask = torch.ones_like(ids) if mask is None else mask
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        given = {name: value.numpy() for name, value in given.items()}
        logits, *present = self.session.run(None, given | (self.past or self.empty(len(ids))))
        self.past = dict(zip(self.empty(1), present, strict=True))
        return torch.from_numpy(logits)

    def empty(self, batch):
        """A past of no tokens."""
        shapes = {entry.name: entry.shape for entry in self.session.get_inputs()[3:]}
        return {name: torch.zeros(batch, s[1], 0, s[3]).numpy() for name, s in shapes.items()}

    def steps(self, ids, mask, *cuts):
        """The logits of all tokens, which go in by parts: those up to each cut, then one by one."""
        cuts = [0, *cuts, *range(cuts[-1] + 1, ids.shape[1] + 1)]
        return torch.cat([self(ids[:, i:j], mask[:, :j]) for i, j in itertools.pairwise(cuts)], 1)


def apart(theirs, ours):
    """The largest difference over the largest logit."""
    assert theirs.dtype == torch.float32 and theirs.shape == ours.shape
    return float((theirs - ours).abs().max() / ours.abs().max())


def greedy(run, ids):
    """8 tokens. run: all tokens so far, and how many of them are new -> logits."""
    start = new = ids.shape[1]
    for _ in range(8):
        ids, new = torch.cat([ids, run(ids, new)[:, -1:].argmax(-1)], 1), 1
    return ids[0, start:].tolist()


def compare(path, **entries):
    """How far the logits are apart, and 8 greedy tokens of both, the engine's through its cache."""
    model, cached = load_model(open_checkpoint(path)), Session(path, **entries)
    with torch.no_grad():
        largest = apart(Session(path, **entries)(TOKENS), model(TOKENS).logits)
        ours = greedy(lambda ids, new: model(ids).logits, TOKENS)
    return largest, [ours, greedy(lambda ids, new: cached(ids[:, -new:], torch.ones_like(ids)), TOKENS)]


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_the_engine_computes_what_we_decode(tmp_path, model, kind):
    largest, said = compare(written(tmp_path, model, kind))
    print(f"{model} {kind}: {largest:.2g} of the largest logit")
    assert largest < SAME
    assert said[0] == said[1]


@pytest.mark.parametrize("model", MODELS)
def test_a_text_in_parts_is_the_text_at_once(tmp_path, model):
    path = written(tmp_path, model, "int4_g32")
    ids = torch.arange(10, 50)[None]  # five windows long
    mask = torch.ones_like(ids)
    with torch.no_grad():
        ours = load_model(open_checkpoint(path))(ids).logits
    whole = Session(path)(ids)
    for cuts in ((1,), (13,), (13, 16, 30)):
        found = Session(path).steps(ids, mask, *cuts)
        print(f"{model} {cuts}: {apart(found, whole):.2g}, {apart(found, ours):.2g} of the largest logit")
        assert apart(found, whole) < SAME and apart(found, ours) < SAME


@pytest.mark.parametrize("model", MODELS)
def test_a_padded_batch_is_each_of_its_rows_alone(tmp_path, model):
    path = written(tmp_path, model, "int4_g32")
    rows = [torch.arange(10, 31), torch.arange(60, 72), torch.tensor([5, 6, 7])]
    pads = [21 - len(row) for row in rows]
    ids = torch.stack([torch.nn.functional.pad(row, (n, 0)) for row, n in zip(rows, pads, strict=True)])
    mask = (torch.arange(21)[None] >= torch.tensor(pads)[:, None]).long()
    whole, parts, blind = Session(path)(ids, mask), Session(path).steps(ids, mask, 17), Session(path)(ids)
    assert whole.isfinite().all() and parts.isfinite().all()
    for i, row in enumerate(rows):
        alone = Session(path)(row[None])[0]
        largest = [apart(found[i, pads[i] :], alone) for found in (whole, parts, blind)]
        print(
            f"{model} row {i}: {largest[0]:.2g} whole, {largest[1]:.2g} in parts, {largest[2]:.2g} unmasked"
        )
        assert largest[0] < SAME and largest[1] < SAME
        assert i == 0 or largest[2] > 1000 * SAME


def test_padding_within_a_text_does_not_move_its_window(tmp_path):
    path, text, pads = written(tmp_path, "mistral", "int4_g32"), torch.arange(10, 40), torch.zeros(5).long()
    ids = torch.cat([text[:20], pads, text[20:]])[None]
    mask = torch.ones_like(ids)
    mask[:, 20:25] = 0
    found = Session(path).steps(ids, mask, 25)
    assert apart(found[mask == 1], Session(path)(text[None])[0]) < SAME


def test_a_mixture_and_a_quantized_output(tmp_path):
    rules = (
        ("*.down_proj.weight", "int8_g32"),
        ("lm_head.weight", "int8_channel"),
        ("*.0.*.q_proj.weight", "f16"),
    )
    path = written(tmp_path, "llama", "int4_g64_asym", *rules)
    kinds = {tensor.dtype for tensor in open_checkpoint(path).tensors.values()}
    assert {"int4_g64_asym", "int8_g32", "int8_channel", "f16"} <= kinds
    largest, said = compare(path)
    assert largest < SAME and said[0] == said[1]


def test_rows_with_zeros_meet_rounded_inputs(tmp_path):
    path = written(tmp_path, "llama", "int8_channel_asym")
    assert SAME < compare(path)[0] < ROUNDED
    largest, said = compare(path, qdq_matmulnbits_accuracy_level="0")
    assert largest < SAME and said[0] == said[1]


def test_a_batch_and_a_single_token(tmp_path):
    path = written(tmp_path, "mistral", "int4_g32")
    model = load_model(open_checkpoint(path))
    for ids in (torch.arange(40).reshape(2, 20), torch.tensor([[5]])):
        with torch.no_grad():
            ours = model(ids).logits
        assert apart(Session(path)(ids), ours) < SAME


# ---- verify, and the script it runs ----------------------------------------------------------------


def change(path, *changes):
    """Apply functions of the ModelProto to model.onnx; the arrays stay."""
    model = onnx.load(path / "model.onnx", load_external_data=False)
    for made in changes:
        made(model)
    (path / "model.onnx").write_bytes(model.SerializeToString())


def without_cache(model):
    """A graph of input_ids alone: mask, positions and an empty past are made inside, no present goes out."""
    make, types, graph = onnx.helper.make_node, onnx.TensorProto, model.graph
    one, axis = (onnx.helper.make_tensor(name, types.INT64, [1], [1]) for name in ("one", "axis"))
    nodes = [
        make("Shape", ["input_ids"], ["shape"]),
        make("ConstantOfShape", ["shape"], ["attention_mask"], value=one),
        make("CumSum", ["attention_mask", "axis"], ["count"]),
        make("Sub", ["count", "axis"], ["position_ids"]),
    ]
    past = [(i.name, [a.dim_value for a in i.type.tensor_type.shape.dim]) for i in graph.input[3:]]
    empty = [onnx.helper.make_tensor(name, types.FLOAT, [1, s[1], 0, s[3]], []) for name, s in past]
    nodes += graph.node
    del graph.node[:], graph.input[1:], graph.output[1:]
    graph.node.extend(nodes)
    graph.initializer.extend([axis, *empty])


@pytest.mark.parametrize("model", ["mistral", "qwen3"])
def test_verify_runs_a_graph_with_a_cache_and_one_without(tmp_path, model):
    path = written(tmp_path, model, "int4_g32")
    outcome = verify(path)
    assert (outcome.engine, outcome.verdict, outcome.greedy) == ("onnxruntime", "same", NEW)
    assert outcome.version == ort.__version__
    change(path, without_cache)
    names = [entry.name for entry in Session(path).session.get_inputs()]
    older = verify(path)
    assert names == ["input_ids"] and (older.verdict, older.greedy) == ("same", NEW)
    assert older.kl == outcome.kl


def test_verify_sees_another_meaning(tmp_path):
    def swap_two_weights(model):
        for node in model.graph.node:
            if node.op_type == "MatMulNBits" and "gate_proj" in node.input[1]:
                node.input[1] = node.input[1].replace("gate_proj", "up_proj")

    path = written(tmp_path, "qwen3", "int4_g32")
    change(path, swap_two_weights)
    assert verify(path).verdict == "differs"


@pytest.mark.parametrize("to", ["int4_g32_asym", "int8_channel_asym", "int8_tensor_asym"])
def test_verify_of_zero_points_is_as_near_as_sums_in_another_order(tmp_path, to):
    outcome = verify(written(tmp_path, "llama", to))
    assert outcome.verdict == "same" and outcome.kl < 1e-6, outcome.line()


def test_verify_continues_through_the_cache(tmp_path):
    def forget(model):
        for node in model.graph.node:
            if node.output[0] == "present.0.value":
                node.input[0], node.input[1] = node.input[1], node.input[0]

    path = written(tmp_path, "llama", "int4_g32")
    change(path, forget)
    outcome = verify(path)
    assert outcome.verdict == "differs" and outcome.kl < SAME  # the prompt has no past, the rest has
    assert outcome.greedy < NEW and "no logit of the prompt is off by more" in outcome.line()


# ---- onnxruntime-genai -----------------------------------------------------------------------------


def generated(path, rows, count=8):
    """The tokens after each row `(b, t)`."""
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(path))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=rows.shape[1] + count, batch_size=len(rows))
    generator = og.Generator(model, options)
    generator.append_tokens(rows.int().numpy())
    for _ in range(count):
        generator.generate_next_token()
    return [generator.get_sequence(i)[rows.shape[1] :].tolist() for i in range(len(rows))]


@pytest.mark.parametrize("model", MODELS)
def test_genai_chooses_the_tokens_that_the_file_means(tmp_path, model):
    pytest.importorskip("onnxruntime_genai")
    path = written(tmp_path, model, "int4_g32")
    ours = load_model(open_checkpoint(path))
    config = json.loads((path / "genai_config.json").read_text())["model"]
    rows = [torch.arange(10, 31), torch.arange(60, 72)]
    with torch.no_grad():
        meant = [greedy(lambda ids, new: ours(ids).logits, row[None]) for row in rows]
    assert not {config["eos_token_id"], config["pad_token_id"]} & {*meant[0], *meant[1]}
    assert [generated(path, row[None])[0] for row in rows] == meant
    padded = torch.nn.functional.pad(
        rows[1], (0, 9), value=config["pad_token_id"]
    )  # its mask is for this side
    assert generated(path, torch.stack([rows[0], padded])) == meant


# ---- onnxruntime-genai's builder, for architectures that have no graph here --------------------------

OTHERS = {
    "GraniteForCausalLM": ("granite", {
        "embedding_multiplier": 2.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5,
        "logits_scaling": 3.0}),
    "Gemma2ForCausalLM": ("gemma2", {
        "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8, "tie_word_embeddings": True}),
    "Phi3ForCausalLM": tiny.MODELS["Phi3ForCausalLM"],
}  # fmt: skip
EXACT = ["accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"]


@pytest.mark.parametrize(
    ("file", "kind"), [("gptq", "int4_g32"), ("gptq", "int8_g32"), ("awq", "int4_g32_asym")]
)
@pytest.mark.parametrize("name", OTHERS)
def test_genai_s_builder_packs_the_codes_of_a_directory_of_ours(tmp_path, monkeypatch, name, file, kind):
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("onnx_ir")
    monkeypatch.setitem(tiny.MODELS, name, OTHERS[name])
    quantize(save_tiny(name, tmp_path / "source"), tmp_path / "in", Request(to=kind, file=file))
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        tmp_path / "in",
        "-o",
        tmp_path / "out",
    ]
    command += ["-c", tmp_path / "cache", "-p", "int4", "-e", "cpu", "--extra_options", *EXACT]
    command += ["windowed_kv_cache=false"]  # else a past of no tokens is refused
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    past = {e.name: torch.zeros(1, 2, 0, 64).numpy() for e in session.get_inputs()[2:]}
    given = {"input_ids": TOKENS.numpy(), "attention_mask": torch.ones_like(TOKENS).numpy()}
    model = load_model(open_checkpoint(tmp_path / "in"))
    with torch.no_grad():
        ours = model(TOKENS).logits
    assert apart(torch.from_numpy(session.run(["logits"], given | past)[0]), ours) < SAME
    ids = greedy(lambda ids, new: model(ids).logits, TOKENS)
    assert generated(tmp_path / "out", TOKENS)[0] == ids
