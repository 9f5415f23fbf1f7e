"""Statistics of scored tokens: pure functions of log-probabilities.

With p the reference's distribution over the vocabulary, q the quantized model's and t the token that came:

    KL(p || q) = sum p (log p - log q)        nll = -log q[t]        agreement: argmax p == argmax q
    perplexity = exp(mean nll)                perplexity ratio = exp(mean (nll_quantized - nll_reference))

Log-probabilities are f32, sums f64. An f32 log-probability carries a rounding error of about 1e-7
of its size, so KL divergences below 1e-7 are noise and may be negative by as much; equal inputs
give exactly 0. Standard errors take tokens as independent: sqrt((E[x^2] - E[x]^2) / (n - 1)), as
llama-perplexity does. Quantiles interpolate linearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt
from typing import NamedTuple

import torch

ROWS_AT_ONCE = 32  # bounds the f64 products to 32 x vocabulary


class Measured(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class TokenScores:
    """One number for each scored token: f64, f64, f64, bool."""

    nll_reference: torch.Tensor
    nll_quantized: torch.Tensor
    kl: torch.Tensor
    same_top: torch.Tensor

    @staticmethod
    def join(parts: list[TokenScores]) -> TokenScores:
        names = ("nll_reference", "nll_quantized", "kl", "same_top")
        return TokenScores(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Fidelity:
    """How far a quantized model's distribution is from its reference's, in nats a token."""

    kl: Measured
    kl_median: float
    kl_99: float
    kl_999: float
    kl_max: float
    agreement: Measured
    perplexity_ratio: Measured


def negative_log_likelihood(log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`(t, vocab)` f32, `(t,)` int64 -> `(t,)` f64."""
    return -log_p.gather(1, targets[:, None])[:, 0].double()


def compare(reference: torch.Tensor, quantized: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Log-probabilities `(t, vocab)` f32 of both on one device, `(t,)` tokens -> TokenScores on the CPU."""
    targets = targets.to(quantized.device)
    kl = [
        (p.double().exp() * (p.double() - q.double())).sum(1)
        for p, q in zip(reference.split(ROWS_AT_ONCE), quantized.split(ROWS_AT_ONCE), strict=True)
    ]
    return TokenScores(
        nll_reference=negative_log_likelihood(reference, targets).cpu(),
        nll_quantized=negative_log_likelihood(quantized, targets).cpu(),
        kl=torch.cat(kl).cpu(),
        same_top=(reference.argmax(1) == quantized.argmax(1)).cpu(),
    )


def mean(values: torch.Tensor) -> Measured:
    """`(t,)` -> mean and standard error; the error of a single value is 0."""
    values = values.double()
    error = sqrt(float(values.var(correction=0)) / (len(values) - 1)) if len(values) > 1 else 0.0
    return Measured(float(values.mean()), error)


def perplexity(nll: torch.Tensor) -> Measured:
    """exp of the mean; the error is propagated through the exponential."""
    value, error = mean(nll)
    return Measured(exp(value), exp(value) * error)


def fidelity(scores: TokenScores) -> Fidelity:
    quantiles = torch.tensor([0.5, 0.99, 0.999], dtype=torch.float64)
    median, q99, q999 = torch.quantile(scores.kl, quantiles).tolist()
    return Fidelity(
        kl=mean(scores.kl),
        kl_median=median,
        kl_99=q99,
        kl_999=q999,
        kl_max=float(scores.kl.max()),
        agreement=mean(scores.same_top),
        perplexity_ratio=perplexity(scores.nll_quantized - scores.nll_reference),
    )
