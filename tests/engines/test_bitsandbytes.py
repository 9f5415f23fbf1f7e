"""Directories for bitsandbytes, in transformers with the package on a CPU, against our own forward.

Needs `pip install bitsandbytes accelerate`. The package decodes 4-bit weights and multiplies in f32, as we
do, unless the CPU has AVX512-BF16: there it rounds absmax, weights, activations and outputs to bf16, 0.0016
of each in root mean square (see test_types.py), so 2 * 0.0016 together; and it takes no weight whose rows
are not a multiple of 32. LLM.int8() rounds each token's activations to 127 steps of its largest: of 256
normal values that is 2.8 sigma, so an activation is off by 2.8 / 127 / sqrt(12) = 0.0064 of its root mean
square. These two layers make up to 10 times that of it in the logits.
"""

import pytest
import torch

from fewbits.adapters.transformers import load_model
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from fewbits.plan import Plan, Rule
from fewbits.qtensor import QTensor
from fewbits.release.verify import verify
from fewbits.workflow.request import Request
from fewbits.workflow.run import convert
from fewbits.workflow.run import run as quantize
from tests.tiny import save_tiny

pytestmark = pytest.mark.engine
bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

TOKENS = torch.arange(10, 31)[None]
SAME = 3e-5  # f32 sums in another order, relative to the largest logit
ROUNDED = {"bf16": 10 * 2 * 0.72 * 2**-7 / 12**0.5, "int8": 10 * 2.8 / 127 / 12**0.5}
FOUR_BITS = ["nf4", "fp4", "nf4_dq", "fp4_dq", "nf4_g128", "nf4_g32_dq"]
MODELS = {"LlamaForCausalLM": {}, "Qwen2ForCausalLM": {}}  # the second ties its output to the embeddings


def in_engine(path, bf16=False):
    """bf16: leave it to the package whether it computes in bf16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and not bf16:
            module.support_avx512bf16_for_cpu = False
    return model


def quantized(tmp_path, to, model="LlamaForCausalLM", *rules):
    source = save_tiny(model, tmp_path / "source")
    plan = Plan(tuple(Rule(match, kind) for match, kind in rules))
    quantize(source, tmp_path / "out", Request(to=to, file="bitsandbytes", plan=plan))
    return tmp_path / "out"


def compare(path, bf16=False):
    """Logits of ours and of the engine, their continuations, the engine's modules."""
    ours, theirs = load_model(open_checkpoint(path)), in_engine(path, bf16)
    with torch.no_grad():
        logits = [model(TOKENS).logits.float() for model in (ours, theirs)]
    said = [m.generate(TOKENS, max_new_tokens=8, do_sample=False)[0].tolist() for m in (ours, theirs)]
    return logits, said, [type(module) for module in theirs.modules()]


def off_by(logits):
    """Root mean square of the difference, over that of the logits."""
    ours, theirs = logits
    return float((ours - theirs).square().mean().sqrt() / ours.square().mean().sqrt())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("to", FOUR_BITS)
def test_the_engine_multiplies_what_we_decode(tmp_path, to, model):
    (ours, theirs), said, modules = compare(quantized(tmp_path, to, model))
    largest = float((ours - theirs).abs().max() / ours.abs().max())
    print(f"{model} {to}: largest difference {largest:.1e} of the largest logit")
    assert modules.count(bnb.nn.Linear4bit) == 14 and largest < SAME
    assert said[0] == said[1]


@pytest.mark.parametrize("to", ["nf4", "fp4_dq"])
def test_in_bf16_it_differs_by_its_rounding(tmp_path, to):
    off = off_by(compare(quantized(tmp_path, to), bf16=True)[0])
    print(f"{to}, as the package chooses: root mean square difference {off:.1e} of the logits'")
    assert off < ROUNDED["bf16"]


def test_llm_int8_differs_by_its_rounded_activations(tmp_path):
    logits, _, modules = compare(quantized(tmp_path, "int8_absmax"))
    print(f"int8_absmax: root mean square difference {off_by(logits):.1e} of the logits'")
    assert modules.count(bnb.nn.Linear8bitLt) == 14 and off_by(logits) < ROUNDED["int8"]


@pytest.mark.parametrize("kind", ["nf4_dq", "int8_absmax"])
def test_modules_left_in_float_and_a_quantized_output(tmp_path, kind):
    """The list of modules that are skipped is the package's only way to know."""
    rules = ("*.layers.1.mlp.down_proj", "f32"), ("lm_head", kind)
    logits, _, modules = compare(quantized(tmp_path, kind, "LlamaForCausalLM", *rules))
    count = modules.count(bnb.nn.Linear4bit) + modules.count(bnb.nn.Linear8bitLt)
    assert count == 14 and modules.count(torch.nn.Linear) == 1
    assert off_by(logits) < (ROUNDED["int8"] if kind == "int8_absmax" else SAME)


@pytest.mark.parametrize("kind", ["nf4_dq", "int8_absmax"])
def test_verify_compares_in_f32_what_the_package_decodes(tmp_path, kind):
    """Of a model in bf16, as published ones are: the package computes in that, or with inputs in 8 bits."""
    from transformers import AutoModelForCausalLM

    source = save_tiny("LlamaForCausalLM", tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    quantize(source, tmp_path / "out", Request(to=kind, file="bitsandbytes"))
    outcome = verify(tmp_path / "out")
    assert outcome.verdict == "same" and outcome.kl < 1e-6, outcome.line()


@pytest.mark.parametrize("kind", ["nf4", "nf4_dq", "fp4_dq", "int8_absmax"])
def test_what_the_package_saves_opens_here(tmp_path, kind):
    """save_pretrained of what the package quantized itself, and the same through a native directory."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = save_tiny("LlamaForCausalLM", tmp_path / "source")
    settings = {"bnb_4bit_quant_type": kind[:3], "bnb_4bit_use_double_quant": kind.endswith("_dq")}
    settings |= {"load_in_8bit": True} if kind == "int8_absmax" else {"load_in_4bit": True}
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "theirs")
    opened = open_checkpoint(tmp_path / "theirs")
    counted = 0
    for name, module in model.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            continue
        counted += 1
        q = opened.tensors[f"{name}.weight"].load()
        assert isinstance(q, QTensor) and q.format is FORMATS.get(kind)
        if kind == "int8_absmax":
            scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            theirs = bnb.functional.int8_vectorwise_dequant(module.weight.data, scale)
            assert torch.allclose(q.decode(), theirs.float(), rtol=2**-22, atol=0)
        else:
            module.weight.quant_state.dtype = torch.float32
            assert torch.equal(
                q.decode(), bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            )
    assert counted == 14
    convert(tmp_path / "theirs", tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "again", "bitsandbytes")
    again = open_checkpoint(tmp_path / "again").tensors
    for name, lazy in opened.tensors.items():
        first, second = lazy.load(), again[name].load()
        same = [x.decode() if isinstance(x, QTensor) else x for x in (first, second)]
        assert torch.equal(*same)
    logits, _, modules = compare(tmp_path / "again")
    assert modules.count(torch.nn.Linear) == 1
    # float weights that lie there in bf16 stay so, and the forward with them
    assert off_by(logits) < ROUNDED["int8" if kind == "int8_absmax" else "bf16"]
