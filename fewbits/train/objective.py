"""What is minimized, of one window's logits z `(c, v)`, with its gradient in closed form:

    kl           KL(p || q) of the parent's p and q = softmax(z)                       q - p
    next-token   -log q of the token that follows                                      q - 1[next]
    mix          half of each

    at temperature T: T^2 KL(softmax(z_p / T) || softmax(z / T))                       T (q_T - p_T)

The parent's k most probable tokens may stand for all, the others as one event with the mass r that is left:

    KL = sum over k of p log(p / q) + r log(r / s),  s = 1 - sum over k of q    q - p; others: q (1 - r / s)

It is at most the whole divergence, and 0 where q equals p on the k tokens.

Sources: Hinton et al., arXiv 1503.02531 (temperature, and T^2 for gradients of one size).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch

LOSSES = {"kl": 1.0, "next-token": 0.0, "mix": 0.5}  # name -> the share of KL
NAMES = {"kl": "KL divergence", "next-token": "next-token loss", "mix": "half KL, half next-token loss"}
LEAST = 1e-12  # of a mass that is left


@dataclass(frozen=True)
class Distributions:
    """The parent's next-token distributions of a window, at a temperature: log p `(c, v)`, or of the k most
    probable tokens `ids` `(c, k)`, log p `(c, k)`."""

    log_p: torch.Tensor
    ids: torch.Tensor | None = None

    @classmethod
    def of(cls, logits: torch.Tensor, temperature: float, top_k: int) -> Distributions:
        """From logits `(c, v)`; top_k 0: all."""
        log_p = (logits.float() / temperature).log_softmax(-1)
        if not 0 < top_k < log_p.shape[-1]:
            return cls(log_p)
        values, ids = log_p.topk(top_k, -1)
        return cls(values, ids)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """`(c, v)` both -> the mean over c of KL(p || q)."""
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def loss_and_gradient(
    logits: torch.Tensor,
    parent: Distributions | None,
    window: torch.Tensor,
    at: slice,
    share: float,
    temperature: float = 1.0,
) -> tuple[float, torch.Tensor]:
    """Logits `(p, v)` of the positions `at` of a window `(c,)` -> their part of its mean loss, and the
    gradient `(p, v)` f32.

    parent: its distributions there, unless share, the part of KL in the loss, is 0. The next-token loss has
    no term at the window's last position."""
    loss, gradient, c = 0.0, None, len(window)
    if share > 0:
        assert parent is not None
        z = logits.float() if temperature == 1 else logits.float() / temperature
        found, gradient = _towards(parent, z.log_softmax(-1))
        scale = share * temperature**2
        loss += scale * found / c
        gradient = gradient.mul_(scale / temperature / c)
    if share < 1:
        following = window[at.start + 1 : at.stop + 1]
        log_q = logits.float().log_softmax(-1)
        chosen = torch.arange(len(following), device=logits.device), following
        loss -= (1 - share) * float(log_q[chosen].sum()) / (c - 1)
        to_z = log_q.exp_()
        to_z[chosen] -= 1
        to_z[len(following) :] = 0
        to_z.mul_((1 - share) / (c - 1))
        gradient = to_z if gradient is None else gradient.add_(to_z)
    assert gradient is not None
    return loss, gradient


def _towards(parent: Distributions, log_q: torch.Tensor) -> tuple[float, torch.Tensor]:
    """-> KL summed over positions, and q - p (of the rest q (1 - r / s)) `(p, v)`."""
    p = parent.log_p.exp()
    if parent.ids is None:
        loss = float((parent.log_p - log_q).mul_(p).sum(-1).sum())
        return loss, log_q.exp_().sub_(p)
    inside = log_q.gather(-1, parent.ids)
    left_p = (1 - p.sum(-1, keepdim=True)).clamp(min=LEAST)
    # Not 1 - the sum of q, of which nothing is left where the student is sure.
    left_q = log_q.scatter(-1, parent.ids, -torch.inf).logsumexp(-1, keepdim=True).clamp(min=log(LEAST))
    each = (p * (parent.log_p - inside)).sum(-1) + (left_p * (left_p.log() - left_q))[:, 0]
    to_z = log_q.exp() - left_p * (log_q - left_q).exp()
    return float(each.sum()), to_z.scatter_(-1, parent.ids, inside.exp() - p)
