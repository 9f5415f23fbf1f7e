"""llama.cpp's converter, given what it expects, inside its environment.

    python run_converter.py FOLDER PRE ARGUMENTS of convert_hf_to_gguf.py ...

FOLDER holds convert_hf_to_gguf.py, conversion/ and gguf-py/. PRE names the pre-tokenizer of a tokenizer that
the converter does not know by the digest of its ids: one with another vocabulary than the published ones.
What config.json says goes before what an older transformers makes of it. A vocabulary shorter than the
embedding is padded. Layers for multi-token prediction are not asked for where the checkpoint has none, as
transformers saves it.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(folder: str, pre: str, *arguments: str) -> None:
    sys.path[:1] = [folder, str(Path(folder) / "gguf-py")]  # not our folder, which has a transformers.py
    import gguf
    from conversion.base import ModelBase, TextModel

    known, load = TextModel.get_vocab_base_pre, ModelBase.load_hparams
    index, rows = ModelBase.index_tensors, [0]

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

    def as_written(model: Path, *given: Any, **more: Any) -> dict[str, Any]:
        written = json.loads((model / "config.json").read_text(encoding="utf-8"))
        rows.append((written.get("text_config") or written).get("vocab_size") or 0)
        return {**load(model, *given, **more), **written}

    def padded(name: str, filler: Callable[[int], Any]) -> None:
        """A list of tokens as long as the embedding."""
        write = getattr(gguf.GGUFWriter, name)

        def longer(writer: Any, values: Any) -> None:
            values = list(values)
            write(writer, values + [filler(i) for i in range(len(values), rows[-1])])

        setattr(gguf.GGUFWriter, name, longer)

    padded("add_token_list", lambda i: f"[PAD{i}]")
    padded("add_token_types", lambda i: gguf.TokenType.UNUSED)
    padded("add_token_scores", lambda i: -1000.0)
    TextModel.get_vocab_base_pre, ModelBase.index_tensors = named, without_mtp
    ModelBase.load_hparams = staticmethod(as_written)
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    runpy.run_path(str(Path(folder) / "convert_hf_to_gguf.py"), run_name="__main__")


def _of_mtp(config: dict[str, Any], name: str) -> bool:
    """Is it a layer for multi-token prediction: named so, or beyond the model's own layers?"""
    config = config.get("text_config") or config
    layer = re.search(r"\blayers\.(\d+)\.", name)
    return "mtp" in name or (layer is not None and int(layer[1]) >= config.get("num_hidden_layers", 2**31))


if __name__ == "__main__":
    main(*sys.argv[1:])
