"""ONNX directories in onnxruntime on the CPU, against our own forward: `pip install 'fewbits[onnx]'`.

Both multiply in f32 and sum in another order: 2.1e-6 of the largest logit at most was measured (onnxruntime
1.32), SAME is 1e-5. A DequantizeLinear with zeros is fused by onnxruntime into a product with inputs of 8
bits, in seven weights of each of two blocks: 0.026 to 0.040 of the largest logit was measured on five models,
ROUNDED is 0.1. With accuracy level 0 it rounds no input and differs by no more than the others.
"""

import pytest
import torch

from fewbits.adapters.hf import load_model
from fewbits.files.open import open_checkpoint
from fewbits.pipeline import quantize
from fewbits.plan import Plan, Rule
from fewbits.request import Request
from fewbits.verify import verify
from tests.tiny import save_tiny

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.engine

TOKENS = torch.arange(10, 31)[None]
SAME, ROUNDED = 1e-5, 0.1
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
MODELS = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "short": ("LlamaForCausalLM", {"hidden_size": 96, "intermediate_size": 176}),  # last groups are not whole
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
}
FORMATS = ["int4_g32", "int4_g32_asym", "int8_g32", "int8_channel"]
CASES = [(model, kind) for model in ("llama", "qwen3") for kind in FORMATS]
CASES += [("llama3", "int4_g128"), ("short", "int4_g64_asym"), ("short", "int8_g256_asym"), ("short", "bf16")]
CASES += [
    ("mistral", "int8_tensor"),
    ("mistral", "int4_g16"),
    ("qwen2", "int4_g64_bf16"),
    ("qwen2", "int8_g32"),
]


def written(tmp_path, model, kind, *rules):
    name, given = MODELS[model]
    source = save_tiny(name, tmp_path / "source", **given)
    plan = Plan(tuple(Rule(match, to) for match, to in rules))
    quantize(source, tmp_path / "out", Request(to=kind, file="onnx", plan=plan))
    return tmp_path / "out"


def session(path, **entries):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    return ort.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])


def compare(path, **entries):
    """The largest difference over the largest logit, and 8 greedy tokens of both."""
    model, engine, said = load_model(open_checkpoint(path)), session(path, **entries), []

    def theirs(ids):
        return torch.from_numpy(engine.run(None, {"input_ids": ids.numpy()})[0])

    with torch.no_grad():
        first = model(TOKENS).logits
        for run in (lambda ids: model(ids).logits, theirs):
            ids = TOKENS
            for _ in range(8):
                ids = torch.cat([ids, run(ids)[:, -1:].argmax(-1)], 1)
            said.append(ids[0, -8:].tolist())
    return float((first - theirs(TOKENS)).abs().max() / first.abs().max()), said


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_the_engine_computes_what_we_decode(tmp_path, model, kind):
    largest, said = compare(written(tmp_path, model, kind))
    print(f"{model} {kind}: {largest:.2g} of the largest logit")
    assert largest < SAME
    assert said[0] == said[1]


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
    model, engine = load_model(open_checkpoint(path)), session(path)
    for ids in (torch.arange(40).reshape(2, 20), torch.tensor([[5]])):
        with torch.no_grad():
            ours = model(ids).logits
        theirs = torch.from_numpy(engine.run(None, {"input_ids": ids.numpy()})[0])
        assert theirs.dtype == torch.float32 and theirs.shape == ours.shape
        assert (ours - theirs).abs().max() < SAME * ours.abs().max()


def test_verify_runs_the_engine_and_sees_another_meaning(tmp_path):
    path = written(tmp_path, "qwen3", "int4_g32")
    outcome = verify(path)
    assert (outcome.engine, outcome.verdict, outcome.greedy) == ("onnxruntime", "same", 8)
    assert outcome.version == ort.__version__
    graph = onnx.load(path / "model.onnx", load_external_data=False)
    for node in graph.graph.node:  # the arrays stay, the graph swaps two of them
        if node.op_type == "MatMulNBits" and "gate_proj" in node.input[1]:
            node.input[1] = node.input[1].replace("gate_proj", "up_proj")
    (path / "model.onnx").write_bytes(graph.SerializeToString())
    assert verify(path).verdict == "differs"
