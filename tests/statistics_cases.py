"""What the tests of statistics share: models without weights, random statistics of them, a comparison."""

from functools import cache
from pathlib import Path

import torch

from fewbits.calibrate.statistics import Statistics, gather, identify
from fewbits.calibrate.stats import Stats
from fewbits.dtypes import F32
from fewbits.files.checkpoint import Checkpoint, LazyTensor
from fewbits.files.open import FILE_TYPES
from fewbits.model.archs import architectures, every_name
from fewbits.model.sites import sites

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CHUNK = 32
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
MIXTRAL = {**SMALL, "num_local_experts": 8, "num_experts_per_tok": 1}
"""The model of golden/imatrix.*, which tests/engines/test_imatrix.py makes with llama-imatrix."""
NAMES = (
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
)
# A sum in f32 is off by at most 2^-24 for each of the additions that led to it, 64 here.
ROUNDING = 64 * 2.0**-24


@cache
def model(name: str = "MixtralForCausalLM", layers: int = 1, hidden: int = 16) -> Checkpoint:
    """A checkpoint without weights: names and shapes as archs.toml has them, which is all that is asked."""
    arch = architectures()[name]
    config = {
        **SMALL, "architectures": [name], "model_type": arch.model_type, "vocab_size": 40, "head_dim": 8,
        "num_local_experts": 8, "num_experts": 8, "num_hidden_layers": layers, "hidden_size": hidden,
        "_name_or_path": f"{name}-{layers}x{hidden}",
    }  # fmt: skip
    names = [name for name in every_name(arch, config) if name.endswith("weight")]
    tensors = {n: LazyTensor(n, _shape(n, hidden), F32, 0, "", lambda: torch.empty(0)) for n in names}
    return Checkpoint(Path("nowhere"), FILE_TYPES.get("huggingface"), tensors, config)


def _shape(name: str, hidden: int) -> tuple[int, ...]:
    if "norm" in name:
        return (hidden,)
    return (hidden, 24) if "down_proj" in name or ".w2." in name else (24, hidden)


def seen_of(
    checkpoint: Checkpoint,
    seed: int = 0,
    tokens: int = 20,
    hessian: bool = True,
    unseen: tuple[str, ...] = (),
) -> Statistics:
    """Random statistics: sites of a group share theirs."""
    torch.manual_seed(seed)
    groups: dict[str, Stats] = {}
    found = {}
    for site in sites(checkpoint):
        if site.block is not None and not any(part in site.name for part in unseen):
            count = tokens if site.expert is None else 1 + (site.expert + seed) % tokens
            x = torch.randn(count, site.shape[1])
            found[site.name] = groups.setdefault(site.group, Stats.of(x, hessian))
    missing = [s.name for s in sites(checkpoint) if s.block is not None and s.name not in found]
    return gather(identify(checkpoint), f"text {seed}", tokens, found, missing)


def agree(a: Stats | None, b: Stats | None, tolerance: float = 0.0) -> bool:
    """The same count and, of what both know, the same values."""
    if a is None or b is None:
        return a is b
    pairs = [(getattr(a, f), getattr(b, f)) for f in ("absmax", "mean_square", "hessian")]
    return a.count == b.count and all(
        (x is None) == (y is None) and (x is None or torch.allclose(x, y, rtol=tolerance, atol=tolerance))
        for x, y in pairs
    )
