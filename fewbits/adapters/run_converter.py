"""llama.cpp's converter, given what it expects, inside its environment.

    python run_converter.py FOLDER PRE ARGUMENTS of convert_hf_to_gguf.py ...

FOLDER holds convert_hf_to_gguf.py, conversion/ and gguf-py/. PRE names the pre-tokenizer of a tokenizer that
the converter does not know by the digest of its ids: one with another vocabulary than the published ones.
Settings that transformers 5 saves under new names are given under the old ones too. Layers for multi-token
prediction are not asked for where the checkpoint has none, as transformers saves it.
"""

from __future__ import annotations

import re
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
        "layernorm_epsilon": config.get("rms_norm_eps"),
        "head_dim": width // heads if heads and width else None,
    }
    missing = {name: value for name, value in old.items() if config.get(name) is None and value is not None}
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        missing["num_kv_heads"] = 1 if config.get("multi_query") else heads
    return {**config, **missing}


def main(folder: str, pre: str, *arguments: str) -> None:
    sys.path[:1] = [folder, str(Path(folder) / "gguf-py")]  # not our folder, which has a transformers.py
    from conversion.base import ModelBase, TextModel

    known, load = TextModel.get_vocab_base_pre, ModelBase.load_hparams
    index = ModelBase.index_tensors

    def named(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if not pre:
                raise
            return pre

    def without_mtp(self: Any, *given: Any, **more: Any) -> dict[str, Any]:
        """Its tensors, once it is known whether those of multi-token prediction are among them."""
        tensors = index(self, *given, **more)
        if self.supports_mtp_export and not any(_of_mtp(self.hparams, name) for name in tensors):
            type(self).no_mtp = True
        return dict(tensors)

    TextModel.get_vocab_base_pre, ModelBase.index_tensors = named, without_mtp
    ModelBase.load_hparams = staticmethod(lambda *given, **more: with_old_names(load(*given, **more)))
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    runpy.run_path(str(Path(folder) / "convert_hf_to_gguf.py"), run_name="__main__")


def _of_mtp(config: dict[str, Any], name: str) -> bool:
    """Is it a layer for multi-token prediction: named so, or beyond the model's own layers?"""
    config = config.get("text_config") or config
    layer = re.search(r"\blayers\.(\d+)\.", name)
    return "mtp" in name or (layer is not None and int(layer[1]) >= config.get("num_hidden_layers", 2**31))


if __name__ == "__main__":
    main(*sys.argv[1:])
