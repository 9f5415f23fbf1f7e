"""A quantized directory before vLLM's own reader of its config: which of vLLM's schemes takes each weight.

    config.json  ->  QuantizationConfig.from_config  ->  a scheme for q, k and v as one, gate and up as one,
                                                         and every other linear layer; or a refusal

No model is made and no weight is read: the reader is plain Python and runs without a GPU. As in vLLM's
models, `q_proj`, `k_proj` and `v_proj` are one layer of three shards. A scheme that is chosen,
and then finds no kernel for the machine at hand, counts as chosen.

RESULT is not written: the last line on stdout has "read" or "refused", in words.
"""

import json
import re
import struct
import sys
from collections import Counter
from traceback import walk_tb
from typing import Any

import torch

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PLANES = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")

ENGINES = [{"name": "vLLM", "packages": ("vllm",), "install": "`make vllm`", "apart": "vllm"}]


class Linear(torch.nn.Module):
    """Stands for the layer, by whose class name a target may match."""


def main(model_path: str, task_path: str, result_path: str) -> None:
    import vllm

    with open(f"{model_path}/config.json", encoding="utf-8") as file:
        config = json.load(file)["quantization_config"]
    with open(f"{model_path}/model.safetensors", "rb") as weights:
        keys = json.loads(weights.read(struct.unpack("<Q", weights.read(8))[0]))
    try:
        answer = {"read": reading(config, [key for key in keys if key.split(".")[-1] in PLANES])}
    except (ValueError, NotImplementedError) as error:
        answer = {"refused": str(error)}
    print(json.dumps({"engine": "vllm", "version": vllm.__version__, **answer}))


def reading(config: dict, keys: list) -> str:
    """The schemes that take the weights, as text; ValueError or NotImplementedError where none does."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsKVCacheMethod,
    )

    found = get_quantization_config(config["quant_method"]).from_config(config)
    if config["quant_method"] != "compressed-tensors":
        what = (
            f"{found.quant_type}, group size {found.group_size}"
            if hasattr(found, "quant_type")
            else (f"blocks of {found.weight_block_size}")
        )
        return f"{type(found).__name__} of {what}"
    found.packed_modules_mapping = FUSED
    CompressedTensorsKVCacheMethod.validate_kv_cache_scheme(found.kv_cache_scheme)
    layers = sorted({fused(key.rpartition(".")[0]) for key in keys})
    schemes = Counter(scheme(found, layer) for layer in layers)
    cache = "" if found.kv_cache_scheme is None else "; cache in fp8"
    return ", ".join(f"{name} for {count} layers" for name, count in schemes.items()) + cache


def scheme(found: Any, layer: str) -> str:
    """The name of the class of a layer's scheme."""
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme

    try:
        return type(found.get_scheme(Linear(), layer)).__name__
    except (ValueError, AssertionError) as error:
        for frame, _ in walk_tb(error.__traceback__):
            if isinstance(frame.f_locals.get("self"), CompressedTensorsScheme):
                return type(frame.f_locals["self"]).__name__
        raise


def fused(module: str) -> str:
    """`...self_attn.k_proj` -> `...self_attn.qkv_proj`: the layer of vLLM that a module is a shard of."""
    for layer, shards in FUSED.items():
        module = re.sub(rf"\.({'|'.join(shards)})$", f".{layer}", module)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
