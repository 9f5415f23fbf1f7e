"""Chooses the sites with quantized activations by measuring each; the others stay in float.

For each weight W and each token x of some calibration text, in the float model:

    SQNR = -10 log10 of the mean over tokens of |W (Q(x) - x)|^2 / |W x|^2      dB

which is the error from quantizing this input alone. Each token has the same weight, because a few tokens
(above all the first) have outputs a hundred times larger and would dominate a ratio of sums.

The rule: a site whose SQNR is below a limit keeps its input in float. Routers and layers outside the blocks
are never quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import linear

from ..adapters.forward import text_logits
from ..blocks.simulate import changed_inputs
from ..errors import CalibrationError
from ..model.sites import role_of
from .observers import Histogram
from .quantizers import Quantizer, Scheme

# SmolLM2-135M, smoothed (alpha 0.65), int8_g64 weights, int8_dynamic, 4 windows of 512: KL divergence 0.0100
# with no site in float; 0.0084, 0.0058 and 0.0047 at 34, 35 and 36 dB, which leave 11, 26 and 39 of 210.
LIMIT_DB = 35.0


@dataclass(frozen=True)
class Activations:
    """The quantizer of each site's input. sqnr: dB by site, if measured; left: sites kept in float."""

    scheme: Scheme
    quantizers: Mapping[str, Quantizer] = field(default_factory=dict)
    sqnr: Mapping[str, float] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def change(self, site: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The quantized input of a site, for `blocks.simulate.changed_inputs`.

        A dynamic scheme needs no calibration: it also applies to sites that are not listed.
        """
        return self.quantizer(site)(x) if self.quantizes(site) else x

    def quantizer(self, site: str) -> Quantizer:
        return self.quantizers.get(site, Quantizer(self.scheme))

    def quantizes(self, site: str) -> bool:
        """Whether this site's input is quantized."""
        return site not in self.left and bears(site)


def bears(site: str) -> bool:
    """False for routers."""
    return role_of(site) != "router"


def calibrate(
    model: Any,
    windows: torch.Tensor,
    scheme: Scheme,
    rule: str = "mse",
    limit_db: float = LIMIT_DB,
) -> Activations:
    """Run a model over windows `(w, t)` int64 -> its Activations.

    rule: the observer that fixes the range of a static scheme. Raises CalibrationError without a window.
    """
    if not len(windows):
        raise CalibrationError("no calibration window for the activations; at least 1 is needed")
    quantizers: dict[str, Quantizer] = {}
    if not scheme.dynamic:
        seen = observe(model, windows)
        quantizers = {site: Quantizer(scheme, seen[site].affine(scheme, rule)) for site in seen}
    sqnr = measure(model, windows, Activations(scheme, quantizers))
    return Activations(scheme, quantizers, sqnr, tuple(sensitive(sqnr, limit_db)))


def sensitive(sqnr: Mapping[str, float], limit_db: float = LIMIT_DB) -> list[str]:
    """The sites with an SQNR below `limit_db` dB, in the given order. NaN counts as below."""
    return [site for site, decibel in sqnr.items() if not decibel >= limit_db]


def observe(model: Any, windows: torch.Tensor) -> dict[str, Histogram]:
    """Windows `(w, t)` int64 -> the histogram of each site's input."""
    seen: dict[str, Histogram] = {}

    def record(site: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if bears(site):
            histogram = Histogram.of(x)
            seen[site] = seen[site] + histogram if site in seen else histogram
        return x

    _forward(model, windows, record)
    return seen


def measure(model: Any, windows: torch.Tensor, activations: Activations) -> dict[str, float]:
    """Windows `(w, t)` int64 -> the SQNR in dB of each site's output; the model itself runs in float."""
    lost: dict[str, list[torch.Tensor]] = {}

    def record(site: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if bears(site) and x.numel():
            error = activations.change(site, x, weight) - x
            noise, signal = (linear(part, weight).double().square().sum(-1) for part in (error, x))
            lost.setdefault(site, []).append(torch.where(noise == 0, 0.0, noise / signal).flatten())
        return x

    _forward(model, windows, record)
    return {site: -10 * float(torch.cat(parts).mean().log10()) for site, parts in lost.items()}


def _forward(model: Any, windows: torch.Tensor, record: Any) -> None:
    with changed_inputs(model, record), torch.inference_mode():
        for window in windows:
            text_logits(model, window[None], 1)
