"""llama.cpp's converter with two habits of its own mended, inside its environment.

    python run_converter.py FOLDER PRE ARGUMENTS of convert_hf_to_gguf.py ...

FOLDER holds convert_hf_to_gguf.py, conversion/ and gguf-py/. PRE names the pre-tokenizer of a tokenizer that
the converter does not know by the digest of its ids: one with another vocabulary than the published ones.
Settings that transformers 5 saves under new names are given under the old ones too.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any


def with_old_names(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the fields that transformers 4 wrote, where they follow from others."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    old = {
        "n_ctx": config.get("n_positions"),
        "rotary_pct": partial if partial is not None else 1.0,
        "rotary_emb_base": rope.get("rope_theta"),
        "head_dim": width // heads if heads and width else None,
    }
    missing = {name: value for name, value in old.items() if config.get(name) is None and value is not None}
    return {**config, **missing}


def main(folder: str, pre: str, *arguments: str) -> None:
    sys.path[:1] = [folder, str(Path(folder) / "gguf-py")]  # not our folder, which has a transformers.py
    from conversion.base import ModelBase, TextModel

    known, load = TextModel.get_vocab_base_pre, ModelBase.load_hparams

    def named(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if not pre:
                raise
            return pre

    TextModel.get_vocab_base_pre = named
    ModelBase.load_hparams = staticmethod(lambda *given, **more: with_old_names(load(*given, **more)))
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    runpy.run_path(str(Path(folder) / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
