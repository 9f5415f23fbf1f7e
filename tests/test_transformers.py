"""Native directories inside transformers: packed in memory, and the function that the bytes mean."""

import copy
import json
import subprocess
import sys

import pytest
import torch

import fewbits
import fewbits.transformers
from fewbits import Plan
from fewbits.adapters.transformers import load_model
from fewbits.errors import FileError, PlanError
from fewbits.files.open import open_checkpoint
from fewbits.release.verify import verify
from fewbits.runtime.packed import PackedWeight, QEmbedding, QLinear, multiply, packed_modules
from fewbits.workflow.request import Request
from fewbits.workflow.run import run
from tests.packed_models import IDS, auto, logits, planes, quantized

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return quantized(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return quantized(tmp_path_factory.mktemp("qwen2"), "Qwen2ForCausalLM", to="nf4")


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("open_model", [auto, fewbits.load])
@pytest.mark.parametrize("which", ["llama", "tied"])
def test_a_native_directory_computes_what_its_bytes_mean(request, which, open_model):
    """The same decoded weights by the same kernels: not a bit differs where biases are added apart."""
    path = request.getfixturevalue(which)
    meant, found = load_model(open_checkpoint(path)), open_model(path)
    torch.testing.assert_close(logits(found), logits(meant), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("open_model", [auto, fewbits.load])
@pytest.mark.parametrize("which", ["llama", "tied"])
def test_its_weights_stay_packed_in_memory(request, which, open_model):
    """All that the model holds is what the file holds, but for rotary frequencies (f32, not saved) and
    floats that the file has in bf16."""
    path = request.getfixturevalue(which)
    model, tensors = open_model(path), open_checkpoint(path).tensors
    packed = {name: weight for name, _, weight in packed_modules(model)}
    assert {f"{name}.weight" for name in packed} - {"lm_head.weight"} == {
        name for name, tensor in tensors.items() if tensor.quantized and name != "lm_head.weight"
    }
    assert all(tensors[f"{n}.weight"].nbytes == w.nbytes for n, w in packed.items() if n != "lm_head")
    held = {buffer.data_ptr(): buffer.nbytes for w in packed.values() for buffer in w.buffers()}
    assert sum(held.values()) == sum(t.nbytes for t in tensors.values() if t.quantized)
    assert sum(p.numel() for p in model.parameters()) == sum(
        torch.Size(t.shape).numel() for t in tensors.values() if not t.quantized
    )


def test_a_tied_output_shares_the_packed_table(tied):
    model = auto(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head, QLinear) and isinstance(model.model.embed_tokens, QEmbedding)
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert torch.equal(logits(twin), before)


def test_scaled_embeddings_keep_their_scale(tmp_path):
    path = quantized(tmp_path, "Gemma3ForCausalLM")
    model = auto(path)
    assert isinstance(model.model.embed_tokens, QEmbedding)
    torch.testing.assert_close(logits(model), logits(load_model(open_checkpoint(path))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", ["gguf", "gptq", "mlx"])
def test_load_opens_every_file_type(tmp_path, file):
    to = {"gguf": "q4_k_m", "gptq": "int4_g128", "mlx": "int4_g64_asym"}[file]
    try:
        path = quantized(tmp_path, to=to, plan=Plan(), file=file)
    except PlanError as error:
        pytest.fail(str(error))
    model = fewbits.load(path)
    assert isinstance(model.model.layers[0].mlp.up_proj, QLinear)
    torch.testing.assert_close(logits(model), logits(load_model(open_checkpoint(path))), rtol=1e-5, atol=1e-5)


def test_fused_experts_are_floats_and_a_warning_says_so(tmp_path):
    path = quantized(tmp_path, "Qwen3MoeForCausalLM", to="nf4", plan=Plan())
    with pytest.warns(UserWarning, match=r"24 quantized weights, such as .*experts.* are held as floats"):
        model = auto(path)
    assert torch.equal(logits(model), logits(load_model(open_checkpoint(path))))
    model.save_pretrained(tmp_path / "again")
    again = open_checkpoint(tmp_path / "again").tensors
    assert set(again) == set(open_checkpoint(path).tensors)
    assert sum(tensor.quantized for tensor in again.values()) == 8
    assert torch.equal(logits(auto(tmp_path / "again")), logits(model))


def test_weights_of_other_modules_are_floats(tmp_path):
    """GPT-2 keeps (in, out) in a module of its own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "float")
    run(tmp_path / "float", tmp_path / "m", Request(to="int4_g32"))
    with pytest.warns(UserWarning, match="held as floats"):
        model = auto(tmp_path / "m")
    assert torch.equal(logits(model), logits(load_model(open_checkpoint(tmp_path / "m"))))


@pytest.mark.parametrize("open_model", [auto, fewbits.load])
def test_half_precision_casts_floats_and_no_plane(llama, open_model):
    model, full = open_model(llama, dtype=torch.bfloat16), auto(llama)
    kept = [buffer.dtype for _, _, weight in packed_modules(full) for buffer in weight.buffers()]
    assert [b.dtype for _, _, weight in packed_modules(model) for b in weight.buffers()] == kept
    moved = torch.nn.Module.to(full, torch.bfloat16)
    assert [b.dtype for _, _, weight in packed_modules(moved) for b in weight.buffers()] == kept
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    ours, theirs = (m.model.layers[0].mlp(x) for m in (model, moved))
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)


def test_a_module_that_is_kept_in_f32_has_the_same_planes(llama, monkeypatch):
    """transformers casts what matches such a name while loading."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"up_proj"})
    up = auto(llama, torch.bfloat16).model.layers[0].mlp.up_proj.weight
    assert torch.equal(up.decode(torch.float32), open_checkpoint(llama).tensors[UP].load().decode())


# ---- running -------------------------------------------------------------------------------------


def test_it_generates_what_the_decoded_model_generates(llama):
    ids = IDS[:1]
    given = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        fewbits.load(llama).generate(ids, **given), load_model(open_checkpoint(llama)).generate(ids, **given)
    )


def test_a_block_runs_under_torch_compile(llama):
    mlp, x = auto(llama).model.layers[0].mlp, torch.randn(3, 256)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(mlp, backend="eager")(x), mlp(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_model_runs_under_torch_compile(tied):
    model = auto(tied)
    torch.testing.assert_close(
        logits(torch.compile(model, backend="eager")), logits(model), rtol=1e-5, atol=1e-5
    )


def test_a_gradient_goes_through_and_no_floats_are_kept_for_it():
    w = torch.randn(48, 64)
    packed = fewbits.FORMATS.get("int8_g32").encode(w)
    module, x = torch.nn.Linear(64, 48), torch.randn(5, 64, requires_grad=True)
    bias = module.bias.detach()
    from fewbits.runtime.packed import pack_module

    pack_module(module, PackedWeight(packed, torch.float32))
    out = module(x)
    saved = out.grad_fn.next_functions[0][0].saved_tensors
    out.square().sum().backward()
    y = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(y, packed.decode(), bias).square().sum().backward()
    assert saved == ()
    torch.testing.assert_close(x.grad, y.grad)
    assert module.bias.grad is not None and [name for name, _ in module.named_parameters()] == ["bias"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers in an older way
def test_lora_trains_the_adapter_alone(llama):
    peft = pytest.importorskip("peft")
    base = auto(llama)
    before, plain = {k: v.clone() for k, v in base.state_dict().items()}, logits(base)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    assert torch.equal(logits(model), plain)  # B begins as zeros
    model.train()
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in trained.items() if "lora_B" in name)
    left = {k.replace(".base_layer", ""): v for k, v in base.state_dict().items() if "lora_" not in k}
    assert set(left) == set(before)
    assert all(torch.equal(left[key].float(), value.float()) for key, value in before.items())


# ---- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("open_model", [auto, fewbits.load])
@pytest.mark.parametrize("which", ["llama", "tied"])
def test_saved_again_it_is_the_same(request, tmp_path, which, open_model):
    path = request.getfixturevalue(which)
    model = open_model(path)
    model.save_pretrained(tmp_path / "again")
    assert planes(tmp_path / "again").keys() == planes(path).keys()
    quantized = {key: body for key, body in planes(path).items() if key[1]}
    assert quantized == {key: body for key, body in planes(tmp_path / "again").items() if key[1]}
    checkpoint = open_checkpoint(tmp_path / "again")
    assert checkpoint.file_type.name == "native" and "quantization_config" not in checkpoint.config
    assert torch.equal(logits(auto(tmp_path / "again")), logits(model))


def test_shards_open_too(tmp_path, llama):
    auto(llama).save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    quantized = {key: body for key, body in planes(llama).items() if key[1]}
    assert quantized == {key: body for key, body in planes(tmp_path / "again").items() if key[1]}


def test_dequantized_it_is_a_float_model(tied):
    model = auto(tied)
    before = logits(model)
    model.dequantize()
    assert not list(packed_modules(model)) and type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # The same numbers; where they lie in memory may change the order in which a product sums them.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"formats": []}, "version 1, this program reads 1"),
        ({"formats": {"int3_nonsense": {"model.norm.weight": [1, 2]}}}, "int3_nonsense"),
        ({"formats": {"q8_0": {"model.layers.0.mlp.up_proj.weight": [512]}}}, "not a format and a shape"),
        (
            {"formats": {"q8_0": {"model.layers.0.mlp.up_proj.weight": [512, 256]}}},
            "plane 'blocks' is missing",
        ),
    ],
)
def test_a_config_that_contradicts_the_planes_is_refused(tmp_path, llama, change, said):
    auto(llama).save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=said):
        open_checkpoint(tmp_path / "m")
    if "formats" in change and isinstance(change["formats"], dict) and "plane" not in said:
        with pytest.raises(FileError, match=said):
            auto(tmp_path / "m")


# ---- registering ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "registered"),
    [
        ("import fewbits, transformers", False),  # nothing is changed by an import that does not ask for it
        ("import fewbits.transformers, transformers", True),
        ("import transformers; transformers.AutoModelForCausalLM; import fewbits.transformers", True),
        ("import fewbits; fewbits.register()", True),
    ],
)
def test_native_directories_are_registered_when_asked_for(code, registered):
    check = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('fewbits' in m)"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", f"{code}; {check}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr.strip()[-300:]) == (str(registered), "")


@pytest.mark.engine
def test_verify_loads_a_native_directory_in_transformers(llama):
    outcome = verify(llama)
    assert (outcome.engine, outcome.verdict) == ("transformers+fewbits", "same")
    assert outcome.greedy == 8


@pytest.mark.parametrize("name", ["q4_k", "int4_g32", "nf4_dq", "fp8_e4m3_block128"])
def test_a_product_in_pieces_is_the_product(name, monkeypatch):
    """Of formats whose rows stand alone; the others are decoded whole."""
    q = fewbits.FORMATS.get(name).encode(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("fewbits.runtime.packed.AT_ONCE", 256 * 100)
    found = multiply(x, PackedWeight(q, torch.float32))
    torch.testing.assert_close(found, torch.nn.functional.linear(x, q.decode()), rtol=1e-5, atol=1e-4)
