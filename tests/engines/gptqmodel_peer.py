"""Runs in an environment of its own, with gptqmodel installed; imports nothing of fewbits.

    gptqmodel_peer.py JOBS.json       [["read", {"path": DIR, "tokens": [ids], "out": FILE}], ...], in order

read      load a directory -> FILE: logits of the tokens, 8 greedy tokens after them, and `<module>.weight`
          of each quantized module as the package decodes it
pack      pack a weight with given scales and zeros -> FILE: the arrays that the package would save
quantize  quantize a directory of floats -> DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import FORMAT
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import load_file, save_file


def read(path: str, tokens: list[int], out: str, method: str = "gptq") -> None:
    backend = BACKEND.GPTQ_TORCH if method == "gptq" else BACKEND.AWQ_TORCH
    # Without a dtype it takes bf16 on a CPU, and rounds the scales to that.
    model = GPTQModel.load(path, backend=backend, device="cpu", dtype=torch.float16).model
    found = {
        f"{name}.weight": decoded(module)
        for name, module in model.named_modules()
        if isinstance(module, BaseQuantLinear)
    }
    model.float()  # GPTQ's kernel computes in the dtype of its input; AWQ's in f16 all the same
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        found["logits"] = model(ids).logits[0].float()
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    found["greedy"] = ids[0, len(tokens) :].clone()
    save_file({name: value.contiguous() for name, value in found.items()}, out)


def decoded(module: Any) -> torch.Tensor:
    """-> `(n, k)` f32, by the package's own code, uncompiled and with the scales in f32."""
    scales = module.scales.float()
    if isinstance(module, AwqTorchLinear):
        weight = dequantize_gemm(module.qweight, module.qzeros, scales, module.bits, module.group_size)
    else:
        kept, module.scales = module.scales, scales
        weight = TorchLinear.dequantize_weight(module)
        module.scales = kept
    return weight.T.clone()


def pack(given: str, out: str, layout: str, bits: int, group_size: int, sym: bool) -> None:
    """given: FILE of weight `(n, k)`, scales and zeros `(n, groups)`, g_idx `(k,)`."""
    arrays = load_file(given)
    n, k = arrays["weight"].shape
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = arrays["weight"]
    packer = AwqTorchLinear if layout == "awq" else TorchLinear
    module = packer(
        bits=bits, group_size=group_size, sym=sym, desc_act=False, in_features=k, out_features=n,
        format=FORMAT.GEMM if layout == "awq" else FORMAT.GPTQ_V2, register_buffers=True,
    )  # fmt: skip
    module.pack(linear, arrays["scales"], arrays["zeros"], arrays["g_idx"])
    if layout == "gptq":
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=group_size, sym=sym))
    names = ("qweight", "qzeros", "scales") + (() if layout == "awq" else ("g_idx",))
    save_file({name: getattr(module, name).contiguous().clone() for name in names}, out)


def quantize(path: str, out: str, settings: dict[str, Any], windows: list[list[int]]) -> None:
    model = GPTQModel.load(path, QuantizeConfig(**settings))
    model.quantize([{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows], batch_size=1)
    model.save(out)


for job, options in json.loads(Path(sys.argv[1]).read_text()):
    {"read": read, "pack": pack, "quantize": quantize}[job](**options)
