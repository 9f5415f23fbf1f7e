"""Runs in an environment of its own, with llmcompressor installed: GPTQ of a model, timed.

    llmcompressor_quantize.py MODEL TOKENS.json GROUP [DEVICE]

TOKENS.json: windows of token ids. int4, symmetric, in groups of GROUP columns, all linear layers of the
blocks. The last line of stdout is JSON: the seconds of `oneshot` alone, after one on a single window.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM


def quantize(path: str, windows: list[list[int]], group: int, device: str) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    rows = {"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]}
    begun = time.monotonic()
    oneshot(
        model=model, dataset=Dataset.from_dict(rows), recipe=recipe, num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
    )  # fmt: skip
    return time.monotonic() - begun


def main() -> None:
    path, tokens, group, *more = sys.argv[1:]
    with open(tokens, encoding="utf-8") as file:
        windows = json.load(file)
    device = more[0] if more else "cuda"
    quantize(path, windows[:1], int(group), device)
    seconds = quantize(path, windows, int(group), device)
    print(
        json.dumps(
            {"seconds": seconds, "llmcompressor": version("llmcompressor"), "torch": torch.__version__}
        )
    )


if __name__ == "__main__":
    main()
