"""What is made of a small model and compared, for `bench/architectures`.

Each function here makes one output of a Case and returns its faults. A FewbitsError is a refusal, any other
exception a crash.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fewbits
from fewbits.calibrate.tokens import Tokens
from fewbits.evaluation.examples import Examples
from fewbits.evaluation.results import Settings
from fewbits.evaluation.text import Text
from fewbits.runtime.packed import packed_modules
from fewbits.runtime.runner import Blockwise

TENSOR = 0.35  # |w' - w| / |w|: int4 in groups of 32 is at 0.1, and GPTQ up to 0.25 on few tokens
INT8 = 0.02  # the same of int8_channel, rounded to nearest
LOGITS = 2e-3  # of their standard deviation: rounding of f32
WORDS = [f"w{i}" for i in range(3, 300)]


@dataclass
class Case:
    """A float model in `folder / "float"` and in memory. head: what it gives, as in fewbits' HEADS. coverage:
    of the calibrated output."""

    folder: Path
    model: Any
    head: str
    ids: torch.Tensor
    text: Tokens = field(init=False)
    coverage: float | None = None
    left: str = ""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.text = Tokens.of(torch.randint(3, 300, (6, 24), generator=generator), "random")

    def path(self, name: str) -> Path:
        return self.folder / name

    def quantized(self, name: str, **options: Any) -> Any:
        text = {} if "effort" in options else {"calibrate": self.text}
        return fewbits.quantize(self.path("float"), self.path(name), verify=False, **text | options)

    def converted(self, name: str, to: str) -> Path:
        fewbits.convert(self.path(name), self.path(f"{name}.{to}"), file=to)
        return self.path(f"{name}.{to}")

    def loaded(self, path: Path) -> Any:
        """transformers' own loader, with nothing that a user would not give."""
        model, info = type(self.model).from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        wrong = [f"{key}: {str(info[key])[:80]}" for key in ("missing_keys", "unexpected_keys") if info[key]]
        if wrong:
            raise ValueError(f"transformers loads {path.name} with {'; '.join(wrong)}")
        return model.eval()


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out = (
        model(input_ids=ids, use_cache=False) if hasattr(model.config, "use_cache") else model(input_ids=ids)
    )
    return (out.last_hidden_state if getattr(out, "logits", None) is None else out.logits).float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b - mean of b|; a constant is compared by its value."""
    b = b.float()
    size = float((b - b.mean()).norm()) or float(b.norm()) or 1.0
    return float((a.float() - b).norm()) / size


def same(what: str, found: torch.Tensor, wanted: torch.Tensor) -> list[str]:
    moved = distance(found, wanted)
    return [] if moved < LOGITS else [f"{what}: logits are {moved:.2g} of their deviation away"]


def decoded(case: Case, name: str, limit: float) -> list[str]:
    """A native directory, loaded by fewbits and by transformers; its floats are the original's, rounded."""
    found = logits_of(fewbits.load(case.path(name)), case.ids)
    twin = case.loaded(case.converted(name, "huggingface"))
    faults = same("decoded", logits_of(twin, case.ids), found)
    faults += same("native by transformers", logits_of(case.loaded(case.path(name)), case.ids), found)
    before, after = case.model.state_dict(), twin.state_dict()
    for key, weight in before.items():
        error = distance(after[key], weight) if after[key].shape == weight.shape else 9.0
        if not error < limit:
            faults.append(f"{key} is {error:.2g} away from the original")
    return faults


def int4(case: Case) -> list[str]:
    """GPTQ, int4_g32; the float model block by block gives its logits."""
    coverage = case.quantized("int4", to="int4_g32", method="gptq").coverage
    case.coverage = round(coverage["share"], 3) if coverage else 0.0
    case.left = "; ".join(f"{why}: {found['tensors'][0]}" for why, found in coverage.get("left", {}).items())
    faults = decoded(case, "int4", TENSOR)
    if case.head == "causal":
        runner = Blockwise(fewbits.open(case.path("float")))
        found = torch.stack(list(runner.logits(case.ids)))
        faults += same("block by block", found, logits_of(case.model, case.ids))
    return faults


def int8(case: Case) -> list[str]:
    """Without text."""
    case.quantized("int8", to="int8_channel", effort="fast")
    return decoded(case, "int8", INT8)


def evaluate(case: Case) -> list[str]:
    models = case.path("float"), [case.path("int4")]
    if case.head == "causal":
        text = Text(case.text.windows.flatten(), "random")
        kl = fewbits.evaluate(*models, text, Settings(context=24, prompts=0)).quantized_models[0].fidelity.kl
        value = kl.value
    else:
        texts = [" ".join(WORDS[i : i + 20]) for i in range(0, 200, 10)]
        found = fewbits.evaluate_head(*models, Examples(tuple(texts), "words"), Settings(context=24))
        value = next(iter(found.quantized_models[0].figures.values()))
    return [] if math.isfinite(value) else [f"the first figure is {value}"]


def compressed_tensors(case: Case) -> list[str]:
    """Read by transformers and the compressed-tensors package."""
    path = case.converted("int4", "compressed-tensors")
    ours = logits_of(fewbits.load(path), case.ids)
    faults = same("converted", ours, logits_of(fewbits.load(case.path("int4")), case.ids))
    return faults + same("by transformers", logits_of(case.loaded(path), case.ids), ours)


def gptq(case: Case) -> list[str]:
    """Read by fewbits."""
    path = case.converted("int4", "gptq")
    return same(
        "converted",
        logits_of(fewbits.load(path), case.ids),
        logits_of(fewbits.load(case.path("int4")), case.ids),
    )


def rotate(case: Case) -> list[str]:
    """Rotated floats give the same logits; then int8."""
    case.quantized("rotated", to="f32", effort="fast", rotate=True)
    faults = same(
        "floats", logits_of(fewbits.load(case.path("rotated")), case.ids), logits_of(case.model, case.ids)
    )
    case.quantized("rotated8", to="int8_channel", effort="fast", rotate=True)
    return faults + same(
        "int8",
        logits_of(fewbits.load(case.path("rotated8")), case.ids),
        logits_of(case.loaded(case.converted("rotated8", "huggingface")), case.ids),
    )


def awq(case: Case) -> list[str]:
    few = Tokens.of(case.text.windows[:1, :16], "random")  # each scale is tried on all of them
    case.quantized("awq", to="int4_g32", method="rtn", awq=True, calibrate=few)
    return same(
        "decoded",
        logits_of(fewbits.load(case.path("awq")), case.ids),
        logits_of(case.loaded(case.converted("awq", "huggingface")), case.ids),
    )


def in_memory(case: Case) -> list[str]:
    """quantize_model: the logits are those of the decoded weights."""
    twin = deepcopy(case.model)
    model = fewbits.quantize_model(deepcopy(case.model), "int8_channel")
    packed = list(packed_modules(model))
    for name, _, weight in packed:
        twin.get_submodule(name).weight.data.copy_(weight.decode())
    faults = same("packed", logits_of(model, case.ids), logits_of(twin, case.ids))
    faults += [
        f"{name} is {error:.2g} away from the original"
        for name, _, weight in packed
        if not (error := distance(weight.decode(), case.model.get_submodule(name).weight)) < INT8
    ]
    return faults if packed else [*faults, "nothing was quantized"]


OUTPUTS: dict[str, Callable[[Case], list[str]]] = {
    "int4": int4,
    "int8": int8,
    "evaluate": evaluate,
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "rotate": rotate,
    "awq": awq,
    "quantize_model": in_memory,
}
