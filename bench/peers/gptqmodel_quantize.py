"""Runs in an environment of its own, with gptqmodel installed: quantize a model and write it back as floats.

    gptqmodel_quantize.py MODEL TOKENS.json OUT SETTINGS.json

TOKENS.json: windows of token ids. OUT becomes a Hugging Face directory whose float weights hold
exactly the quantized values, so that anything can evaluate it; OUT.packed is what GPTQModel saves.
The last line of stdout is JSON.
GPTQ's layout: qweight packs eight 4-bit codes of a column in an int32, value = scale * (code - zero).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file


def unpacked(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    shifts = torch.arange(0, 32, bits)
    parts = (words.unsqueeze(axis + 1) >> shifts.view(-1, *[1] * (words.ndim - 1 - axis))) & (2**bits - 1)
    return parts.flatten(axis, axis + 1)


def decoded(planes: dict[str, torch.Tensor], bits: int, zero_offset: int) -> torch.Tensor:
    """-> `(n, k)` f32."""
    codes = unpacked(planes["qweight"], bits, 0)
    zeros = unpacked(planes["qzeros"], bits, 1) + zero_offset
    group = planes["g_idx"].long()
    return ((codes - zeros[group]) * planes["scales"].float()[group]).T.contiguous()


def main() -> None:
    model_dir, tokens, out = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    settings = json.loads(Path(sys.argv[4]).read_text())
    texts = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in tokens]
    model = GPTQModel.load(str(model_dir), QuantizeConfig(**settings))
    start = time.monotonic()
    model.quantize(texts, batch_size=1)
    seconds = time.monotonic() - start
    packed = out.with_name(out.name + ".packed")
    model.save(str(packed))
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    offset = 1 if config.get("checkpoint_format", "gptq") == "gptq" else 0
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(packed.glob("*.safetensors")):
        tensors |= load_file(file)
    floats: dict[str, torch.Tensor] = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        floats |= load_file(file)
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    for name in names:
        planes = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        value = decoded(planes, config["bits"], offset)
        if value.shape != floats[f"{name}.weight"].shape:
            raise SystemExit(f"{name}: {tuple(value.shape)} is not {tuple(floats[f'{name}.weight'].shape)}")
        floats[f"{name}.weight"] = value
    out.mkdir(parents=True, exist_ok=True)
    for path in model_dir.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, out / path.name)
    save_file(floats, out / "model.safetensors", {"format": "pt"})
    about = {"seconds": seconds, "quantized": len(names), "config": config, "torch": torch.__version__}
    print(json.dumps(about))


if __name__ == "__main__":
    main()
