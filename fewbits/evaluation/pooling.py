"""How hidden states become one embedding: as sentence-transformers' files beside a model say, else the mean.

modules.json                the steps, a folder for each: 1_Pooling, 2_Normalize
1_Pooling/config.json       {"pooling_mode_mean_tokens": true, ...}
sentence_bert_config.json   {"max_seq_length": 256}
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ModelError
from ..files.checkpoint import Checkpoint
from ..storage.json import read_json_object

_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
SKIPPED = ("Transformer", "Pooling", "Normalize")  # steps known here; Dense would change an embedding


@dataclass(frozen=True)
class Pooling:
    """mode: mean, first, last or max of a text's tokens. longest: tokens of a text, where files say so."""

    mode: str = "mean"
    longest: int | None = None

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`(b, t, h)` and 1 for each token that is no padding on the right, `(b, t)` -> `(b, h)`."""
        inside = mask[..., None].to(hidden.dtype)
        if self.mode == "first":
            return hidden[:, 0]
        if self.mode == "last":
            return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
        if self.mode == "max":
            return hidden.masked_fill(inside == 0, -torch.inf).amax(1)
        return (hidden * inside).sum(1) / inside.sum(1)


def pooling_of(checkpoint: Checkpoint) -> Pooling:
    """ModelError for what is not done here: several modes joined, a layer after the pooling."""
    files, mode = checkpoint.side_files, "mean"
    for name in files:
        folder, _, file = name.rpartition("/")
        kind = folder.partition("_")[2]
        if folder and kind not in SKIPPED:
            raise ModelError(f"{checkpoint.path}: its {folder} changes the embeddings; that is not done here")
        if kind == "Pooling" and file == "config.json":
            given = read_json_object(files[name])
            asked = [key for key, value in given.items() if key.startswith("pooling_mode_") and value is True]
            if len(asked) != 1 or asked[0] not in _MODES:
                raise ModelError(
                    f"{checkpoint.path}: pools by {', '.join(asked)}; one of {', '.join(_MODES)}"
                )
            mode = _MODES[asked[0]]
    settings = files.get("sentence_bert_config.json")
    return Pooling(mode, read_json_object(settings).get("max_seq_length") if settings else None)
