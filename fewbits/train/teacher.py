"""Teacher: the parent's distributions over the vocabulary, for windows that come up again and again.

Its blocks run once for each window; the hidden states are kept, the blocks are let go, and only
the output layer is used again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .halves import Halves


class Teacher:
    """hidden: of each window, `(c, h)` f32."""

    def __init__(self, model: Any, tokens: torch.Tensor, progress: Callable[[int, int], None]):
        """tokens: windows `(w, c)` int64."""
        self._halves = Halves(model, tokens[0])
        self.hidden: list[torch.Tensor] = []
        with torch.no_grad():
            for i, window in enumerate(tokens):
                self.hidden.append(self._halves.blocks(window[None])[0])
                progress(i + 1, len(tokens))
        self._halves.drop_blocks()

    def log_p(self, i: int) -> torch.Tensor:
        """Window i -> log-probabilities `(c, vocab)` f32 of what follows each token."""
        with torch.no_grad():
            return self._halves.head(self.hidden[i][None])[0].float().log_softmax(-1)
