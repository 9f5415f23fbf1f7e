"""compressed-tensors directories in the package itself and in transformers, against our own forward.

What the engine computes, and why a difference is what it is:

    integers and e4m3     decoded in the type of the scales, or of the model where that is loaded first
    e2m1 and e2m3         decoded to bf16, whatever the model's type
    inputs, dynamic int8  scale = largest / 127.5, codes -128 ... 127; ours have 127 and -127 ... 127

`golden()` makes tests/golden/compressed_tensors, which tests/files/test_compressed.py reads:

    python -c "from tests.engines.test_compressed_tensors import GOLDEN, golden; golden(GOLDEN)"
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.activations import CACHES
from fewbits.activations import attention as simulated
from fewbits.activations.kv_cache import to_e4m3
from fewbits.activations.quantizers import SCHEMES, fit, quantize_dequantize
from fewbits.adapters.transformers import load_model
from fewbits.blocks.simulate import changed_attention, changed_inputs
from fewbits.calibrate.tokens import Tokens
from fewbits.files.open import open_checkpoint
from fewbits.plan import Plan, Rule
from fewbits.workflow.request import Request
from fewbits.workflow.run import convert
from fewbits.workflow.run import run as quantize
from tests.tiny import save_tiny

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings(
        "ignore:You passed `quantization_config`:UserWarning"
    ),  # `dequantize` needs one
]
pytest.importorskip("compressed_tensors")

TOKENS = torch.arange(10, 31)
SAME = 3e-5  # f32 sums in another order: see test_architectures.py
GOLDEN = Path(__file__).parents[1] / "golden" / "compressed_tensors"
INT, ASYM, FLOAT = {"type": "int"}, {"type": "int", "symmetric": False}, {"type": "float"}
TWO_LEVELS = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
E8M0 = {"group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
BLOCK = {"strategy": "block", "block_structure": [128, 128]}
GROUPS = {
    "int4_g32": ("pack-quantized", torch.bfloat16, {**INT, "num_bits": 4, "group_size": 32}),
    "int4_g32_asym": ("pack-quantized", torch.float16, {**ASYM, "num_bits": 4, "group_size": 32}),
    "int3_asym": ("pack-quantized", torch.float32, {**ASYM, "num_bits": 3, "group_size": -1}),
    "int5_tensor": ("pack-quantized", torch.float32, {**INT, "num_bits": 5, "strategy": "tensor"}),
    "int8": ("int-quantized", torch.float32, {**INT, "num_bits": 8, "strategy": "channel"}),
    "int4_bytes": ("int-quantized", torch.float32, {**INT, "num_bits": 4, "strategy": "channel"}),
    "int8_asym": ("naive-quantized", torch.bfloat16, {**ASYM, "num_bits": 8, "group_size": 16}),
    "fp8": ("float-quantized", torch.float32, {**FLOAT, "num_bits": 8, "strategy": "channel"}),
    "fp8_tensor": ("naive-quantized", torch.bfloat16, {**FLOAT, "num_bits": 8, "strategy": "tensor"}),
    "fp8_block": ("float-quantized", torch.float32, {**FLOAT, "num_bits": 8, **BLOCK}),
    "nvfp4": ("nvfp4-pack-quantized", torch.float32,
              {**FLOAT, "num_bits": 4, "strategy": "tensor_group", "group_size": 16, **TWO_LEVELS}),
    "mxfp4": ("mxfp4-pack-quantized", torch.float32, {**FLOAT, "num_bits": 4, **E8M0}),
    "mxfp6": ("mxfp6-pack-quantized", torch.float32, {**FLOAT, "num_bits": 6, **E8M0}),
    "mxfp8": ("mxfp8-quantized", torch.float32, {**FLOAT, "num_bits": 8, **E8M0}),
}  # fmt: skip
"""module -> (format, type of the scales, weights of its scheme); 20 x 160 each, so that words are cut"""


def made() -> tuple[dict, dict, dict]:
    """Tensors, quantization_config and decoded weights, all by the package."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    generator = torch.Generator().manual_seed(1)
    tensors, decoded, groups = {}, {}, {}
    for i, (module, (format, dtype, weights)) in enumerate(GROUPS.items()):
        groups[f"group_{i}"] = {"targets": [f"model.{module}"], "weights": weights, "format": format}
        scheme = QuantizationScheme.model_validate(groups[f"group_{i}"])
        w = (torch.randn(20, 160, generator=generator) * torch.logspace(-2, 1, 20)[:, None] + 0.01).to(dtype)
        low, high = (getattr(cells(w, scheme.weights), end)(-1) for end in ("amin", "amax"))
        state = {"weight": w}
        if scheme.weights.strategy == "tensor_group":
            state["weight_global_scale"] = generate_gparam(low.amin(), high.amax()).reshape(1)
        scale, zero = calculate_qparams(
            low, high, scheme.weights, global_scale=state.get("weight_global_scale")
        )
        state |= {"weight_scale": scale.to(dtype), "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(format)
        packed = compressor.compress(state, scheme)
        tensors |= {f"model.{module}.{part}": value.contiguous() for part, value in packed.items()}
        decoded[f"model.{module}.weight"] = compressor.decompress(packed, scheme)["weight"].contiguous()
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    config = QuantizationConfig.model_validate(config | {"quantization_status": "compressed"})
    return tensors, json.loads(config.model_dump_json()), decoded


def cells(w, args):
    """A weight `(n, k)` as `(scales of a row, scales of a column, weights under one scale)`."""
    if args.strategy == "tensor":
        return w.reshape(1, -1)
    if args.strategy == "block":
        return torch.stack([w[:, :128].reshape(-1), w[:, 128:].repeat(1, 4).reshape(-1)])[None]
    columns = args.group_size if args.strategy in ("group", "tensor_group") else w.shape[1]
    return w.unflatten(1, (-1, columns))


def golden(path):
    """The files that tests/files/test_compressed.py reads."""
    path = Path(path)
    path.mkdir(exist_ok=True)
    tensors, config, decoded = made()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    save_file(decoded, path / "decoded.safetensors")
    content = {"model_type": "llama", "quantization_config": config}
    (path / "config.json").write_text(json.dumps(content, indent=1))


def raw(x):
    return x.reshape(-1).clone().view(torch.uint8)


def test_the_package_makes_the_golden_files():
    tensors, config, decoded = made()
    for name, found in (("model", tensors), ("decoded", decoded)):
        kept = load_file(GOLDEN / f"{name}.safetensors")
        assert set(kept) == set(found)
        for key, value in found.items():
            assert kept[key].dtype == value.dtype
            assert torch.equal(raw(kept[key]), raw(value)), key
    assert json.loads((GOLDEN / "config.json").read_text())["quantization_config"] == config


# ---- our directories in transformers -----------------------------------------------------------------


def written(path, to, rules=(), **asked):
    """A tiny model with float32 weights, quantized -> its directory."""
    if not (path / "m").exists():
        save_tiny("LlamaForCausalLM", path / "m")
    quantize(path / "m", path / to, Request(to=to, file="compressed-tensors", plan=Plan(rules), **asked))
    return path / to


def loaded(path, dequantize=False, dtype=torch.float32):
    """The directory in transformers: no key missing, none left over."""
    import transformers

    given = (
        {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, output_loading_info=True, **given
    )
    assert not any(info.values()), info
    return model


def validated(path):
    """The config, by the package's own model; it has nothing that the package does not write."""
    from compressed_tensors.quantization import QuantizationConfig

    said = json.loads((path / "config.json").read_text())["quantization_config"]
    known = QuantizationConfig.model_validate(said)
    assert set(said) <= set(QuantizationConfig.model_fields)
    return known


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS[None]).logits[0].float()


def continuation(model):
    return model.generate(TOKENS[None], max_new_tokens=8, do_sample=False)[0].tolist()


def agree(theirs, ours, what):
    difference = float((logits(theirs) - logits(ours)).abs().max())
    print(f"{what}: {difference:.1e} of {float(logits(ours).abs().max()):.1f}")
    assert difference <= SAME * float(logits(ours).abs().max())
    assert continuation(theirs) == continuation(ours)


@pytest.mark.parametrize(
    "to", ["int4_g128", "int2_g32", "int3_channel", "int8_channel", "int6_g64_bf16", "fp8_e4m3_channel",
           "fp8_e4m3_tensor", "fp8_e4m3_block128"]
)  # fmt: skip
def test_integers_and_e4m3_run_as_they_are_decoded(tmp_path, to):
    """Loaded in f32 the scales become f32, and every weight is ours, bit for bit."""
    path = written(tmp_path, to)
    assert len(validated(path).config_groups) == 1
    theirs, ours = loaded(path), load_model(open_checkpoint(path))
    agree(theirs, ours, to)
    weights = dict(theirs.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in ours.named_parameters())


@pytest.mark.parametrize("to", ["nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp8_e4m3"])
def test_small_floats_run_as_bf16(tmp_path, to):
    """The package decodes to bf16, exact but for nvfp4: our weights are rounded to it too. (Without
    `dequantize` such a model runs in bf16 alone.)"""
    path = written(tmp_path, to)
    validated(path)
    theirs, ours = loaded(path, dequantize=True), load_model(open_checkpoint(path))
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if "_proj" in name:
                value.copy_(value.bfloat16())
    agree(theirs, ours, to)
    assert torch.isfinite(logits(loaded(path, dtype=torch.bfloat16))).all()


@pytest.mark.parametrize("to", ["int4_g32_asym", "int8_g64_asym", "int3_channel_asym_f32"])
def test_asymmetric_integers_run_dequantized(tmp_path, to):
    """compressed-tensors 0.20 makes room for zero points that are not packed, and then cannot load the packed
    ones that it writes itself; `dequantize` can. That decodes in the scales' own type."""
    path = written(tmp_path, to)
    validated(path)
    theirs, ours = loaded(path, dequantize=True), load_model(open_checkpoint(path))
    scale = torch.float32 if to.endswith("f32") else torch.float16
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if "_proj" in name:
                value.copy_(value.to(scale))
    agree(theirs, ours, to)
    if scale == torch.float32:
        saved_by_the_package(tmp_path / "theirs", "W4A16_ASYM")
        for either in (path, tmp_path / "theirs"):
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                loaded(either)


def test_a_mixture_runs(tmp_path):
    others = {"down_proj": "int8_channel", "o_proj": "fp8_e4m3_channel"}
    others |= {f"layers.1.mlp.{part}_proj": "f32" for part in ("gate", "up")}
    rules = tuple(Rule(f"*{part}.weight", kind) for part, kind in others.items())
    path = written(tmp_path, "int4_g32", rules)
    known = validated(path)
    assert known.format == "mixed-precision" and len(known.config_groups) == 3
    agree(loaded(path), load_model(open_checkpoint(path)), "a mixture")


def theirs_dynamic(scheme):
    """Inputs as the package quantizes them, token by token."""

    def change(site, x, weight):
        if scheme.floating:
            return quantize_dequantize(x, scheme, fit(x, scheme))
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        return (x / scale).round().clamp(-128, 127) * scale

    return change


@pytest.mark.parametrize(
    ("to", "activations"),
    [("int8_channel", "int8_dynamic"), ("int4_g128", "int8_dynamic"), ("fp8_e4m3_channel", "fp8_dynamic")],
)
def test_dynamic_activations_run(tmp_path, to, activations):
    """A rounded input may fall on the other side of a half where sums are in another order: the largest
    difference is one step of one input, 1/127 or 1/16 of it, so the logits are compared as a whole."""
    path = written(tmp_path, to, activations=activations)
    group = validated(path).config_groups["group_0"]
    assert group.input_activations.dynamic and group.input_activations.strategy == "token"
    theirs, ours = loaded(path), load_model(open_checkpoint(path))
    with changed_inputs(ours, theirs_dynamic(SCHEMES.get(activations))):
        expected = logits(ours)
    off = float((logits(theirs) - expected).norm() / expected.norm())
    apart = float((logits(ours) - expected).norm() / expected.norm())
    print(f"{to} {activations}: {off:.1e}; without rounding {apart:.1e}")
    assert off < 0.1 * apart


@pytest.mark.parametrize(
    ("to", "activations"),
    [
        ("int8_channel", "int8_static"),
        ("int8_channel", "int8_asymmetric_static"),
        ("fp8_e4m3_tensor", "fp8_static"),
    ],
)
def test_static_activations_run(tmp_path, to, activations):
    tokens = Tokens.of(torch.randint(3, 500, (4, 64), generator=torch.Generator().manual_seed(0)), "random")
    path = written(tmp_path, to, activations=activations, tokens=tokens)
    group = validated(path).config_groups["group_0"]
    assert not group.input_activations.dynamic
    theirs, ours, scheme = loaded(path), load_model(open_checkpoint(path)), SCHEMES.get(activations)
    fixed = dict(theirs.named_parameters())

    def change(site, x, weight):
        module = site.removesuffix(".weight")
        scale, zero = fixed[f"{module}.input_scale"], fixed.get(f"{module}.input_zero_point", torch.zeros(1))
        if scheme.floating:
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return ((x / scale + zero.float()).round().clamp(-128, 127) - zero.float()) * scale

    with changed_inputs(ours, change):
        expected = logits(ours)
    off = float((logits(theirs) - expected).norm() / expected.norm())
    apart = float((logits(ours) - expected).norm() / expected.norm())
    print(f"{to} {activations}: {off:.1e}; without rounding {apart:.1e}")
    assert off < 0.1 * apart


def test_a_cache_in_fp8_is_read_as_it_is_told(tmp_path):
    """The scales lie where the package looks for them, and its keys and values are then ours. (0.20 knows an
    attention by its argument past_key_values, which transformers has renamed in 5.24: run it with 5.23.)"""
    from compressed_tensors.modeling.kvcache import QuantizedKVCache
    from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module

    tokens = Tokens.of(torch.randint(3, 500, (4, 64), generator=torch.Generator().manual_seed(0)), "random")
    path = written(tmp_path, "int4_g128", kv_cache="fp8", tokens=tokens)
    scheme = validated(path).kv_cache_scheme
    assert (scheme.num_bits, scheme.type, scheme.strategy, scheme.dynamic) == (8, "float", "tensor", False)
    scales = open_checkpoint(path).metadata["kv_cache"]["steps"]
    ours = load_model(open_checkpoint(path))
    if not is_cached_attention_module(ours.model.layers[0].self_attn):
        pytest.skip("compressed-tensors does not find the attentions of this transformers")
    theirs = loaded(path)
    caches = {name: module for name, module in theirs.named_modules() if isinstance(module, QuantizedKVCache)}
    print(f"{len(caches)} caches of the package are hooked")
    for module, (of_keys, of_values) in scales.items():
        attention = theirs.get_submodule(module)
        assert (attention.k_scale.item(), attention.v_scale.item()) == pytest.approx((of_keys, of_values))
        x = torch.randn(1, 2, 5, 64)
        keys, values = caches[f"{module}.kv_cache"](x, 2 * x, 0)
        assert torch.equal(keys, to_e4m3(x, of_keys)) and torch.equal(values, to_e4m3(2 * x, of_values))
    with changed_attention(ours, simulated(CACHES.get("fp8"), [*scales.values()])):
        expected = logits(ours)
    off, apart = (float((a - b).norm() / expected.norm()) for a, b in
                  ((logits(theirs), expected), (logits(ours), expected)))  # fmt: skip
    print(f"{off:.1e}; without rounding {apart:.1e}")
    assert off < 0.1 * apart


# ---- directories that transformers writes ------------------------------------------------------------


@pytest.mark.parametrize(
    "preset", ["W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP4"]
)
def test_what_transformers_saves_is_read_and_converted(tmp_path, preset):
    """A model quantized by the package -> our checkpoint -> native: the values that the package decodes."""
    model = saved_by_the_package(tmp_path / "m", preset)
    read = open_checkpoint(tmp_path / "m")
    quantized = [name for name, tensor in read.tensors.items() if tensor.quantized]
    assert len(quantized) == 14
    convert(tmp_path / "m", tmp_path / "native", "native")
    native = open_checkpoint(tmp_path / "native").tensors
    for name in quantized:
        found = native[name].load()
        assert torch.equal(found.decode().to(model[name].dtype), model[name]), name


def saved_by_the_package(path, preset):
    """A tiny model quantized to a preset and saved -> the weights that the package decodes."""
    from compressed_tensors.compressors import ModelCompressor, decompress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    from tests.tiny import tiny_model

    model = tiny_model("LlamaForCausalLM")
    config = QuantizationConfig(config_groups={preset: ["Linear"]}, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        w, args = module.weight.data, scheme.weights
        low, high = torch.aminmax(blocks(w, args), dim=-1)
        gparam = None
        if hasattr(module, "weight_global_scale"):
            gparam = generate_gparam(low.amin(), high.amax()).reshape(1)
            module.weight_global_scale.data = gparam
        scale, zero = calculate_qparams(low, high, args, global_scale=gparam)
        module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(w.dtype)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero.reshape(module.weight_scale.shape)
        for part in ("input_scale", "input_global_scale"):
            if hasattr(module, part):
                getattr(module, part).data.fill_(0.25)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    for module in model.modules():
        decompress_module(module)
    return {name: value.data for name, value in model.named_parameters()}


def blocks(w, args):
    """`(n, k)` -> the weights under one scale along the last axis."""
    if args.strategy == "block":
        n, k = args.block_structure
        return w.unflatten(0, (-1, n)).unflatten(2, (-1, k)).transpose(1, 2).flatten(2)
    return w.reshape(1, -1) if args.strategy == "tensor" else cells(w, args)
