"""What quantizing cost: a reference and its quantized models on the same text.

    reference         ->  log-probabilities of every scored token, on a scratch file  --.
    quantized models  ->  the same, one after the other                                 +-> KL divergence,
                                                                                     '   agreement, perplexity
Only one model is in memory at a time. Windows and scoring are those of `llama-perplexity`: windows
of `context` tokens that do not overlap, the first token replaced by BOS where the model adds one,
and the log-probabilities at positions score_from ... context - 2 (default: the second half) scored
against the token that follows each.

What parity means: a quantized model equal to its reference has a KL divergence of exactly 0, agreement 1,
perplexity ratio 1 and no divergence in any greedy continuation.

Models without a language model's head (classifiers, masked models, embeddings) are compared by
`evaluate_head` on single texts (heads.py).
"""

from .compare import evaluate, memory_need
from .examples import Examples, labelled, lines_of
from .heads import HeadEvaluation, HeadScores, evaluate_head, head_memory_need
from .results import Evaluation, ModelScores, Settings
from .simulated import Simulation
from .text import Text, blank_text, read_text, self_text

__all__ = [
    "Evaluation",
    "Examples",
    "HeadEvaluation",
    "HeadScores",
    "ModelScores",
    "Settings",
    "Simulation",
    "Text",
    "blank_text",
    "evaluate",
    "evaluate_head",
    "head_memory_need",
    "labelled",
    "lines_of",
    "memory_need",
    "read_text",
    "self_text",
]
