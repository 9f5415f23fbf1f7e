"""lm-eval, the evaluation harness, on a model in memory.

Optional: `pip install 'fewbits[harness]'`. It runs a transformers model directly, so packed weights stay
packed. Tasks are its own, or YAML files in the user's directories; a task with local data needs no network.
Its `wikitext` is perplexity per word, which is not comparable with `fewbits evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import KernelError, PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class HarnessRun:
    """tasks: names, or patterns with `*`. include: directories with further tasks. shots: examples in the
    prompt (None: the task's default). limit: the first N documents of each task."""

    tasks: tuple[str, ...]
    include: tuple[Path, ...] = ()
    shots: int | None = None
    limit: int | None = None
    batch: int = 1
    chat: bool = False


@dataclass(frozen=True)
class Score:
    """One metric of a task, with its standard error if the harness has one."""

    task: str
    metric: str
    filter: str
    value: float
    error: float | None


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: HarnessRun) -> list[Score]:
    """Run tasks -> their scores, in the harness's order.

    KernelError if lm-eval is not installed, PlanError naming every unknown task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise KernelError(f"lm-eval is not installed ({error}); `pip install 'fewbits[harness]'`") from error
    manager = TaskManager(include_path=[str(path) for path in run.include] or None)
    known = {name: manager.match_tasks([name]) for name in run.tasks}
    unknown = [name for name, exists in known.items() if not exists]
    if unknown:
        where = ", ".join(str(path) for path in run.include) or "no directory of yours (--include-path)"
        raise PlanError(
            f"lm-eval has no task {', '.join(unknown)}; searched: its own and {where}; `lm-eval ls "
            "tasks` lists its own"
        )
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=run.batch),
        tasks=[task for tasks in known.values() for task in tasks],
        num_fewshot=run.shots,
        limit=run.limit,
        apply_chat_template=run.chat,
        task_manager=manager,
        log_samples=False,
    )
    return [line for task, metrics in results["results"].items() for line in _scores(task, metrics)]


def _scores(task: str, metrics: dict[str, Any]) -> Sequence[Score]:
    """`{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}` -> scores."""
    lines = []
    for key, value in metrics.items():
        metric, comma, filter = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = metrics.get(f"{metric}_stderr,{filter}")
            wide = float(error) if isinstance(error, int | float) else None
            lines.append(Score(task, metric, filter, float(value), wide))
    return lines
