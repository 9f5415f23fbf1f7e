"""Teacher: the reference model's distributions over the vocabulary, for windows that are used repeatedly.

Its blocks run once, one in memory at a time; the hidden states are kept, and only the output layer is used
again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..runtime.runner import Blockwise


class Teacher:
    """Of a model that is run block by block."""

    def __init__(self, runner: Blockwise, tokens: torch.Tensor, progress: Callable[[int, int], None]):
        """tokens: windows `(w, c)` int64."""
        self._runner = runner
        runner.start(tokens)
        for i in range(runner.n_blocks):
            runner.step(i)
            progress(i + 1, runner.n_blocks)

    def hidden(self, i: int) -> torch.Tensor:
        """Window i -> the input of the output layer, `(1, c, h)`."""
        return self._runner.hidden[i]

    def log_p(self, i: int) -> torch.Tensor:
        """Window i -> log-probabilities `(c, vocab)` f32 of the token after each token."""
        with torch.no_grad():
            return self._runner.logits_of(i).log_softmax(-1)
