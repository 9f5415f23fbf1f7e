"""Orthogonal matrices that spread one coordinate over all, with a fast product.

A Hadamard matrix has entries +-1 and orthogonal rows. Known orders are multiplied by Kronecker products:

    order 2^p            [[1, 1], [1, -1]] x ...                               Sylvester 1867
    order q + 1          q prime, q % 4 == 3: from squares modulo q            Paley 1933, construction I
    order 2 (q + 1)      q prime, q % 4 == 1                                   Paley 1933, construction II

    576 = 36 * 16: Paley II with q = 17, times Sylvester      3072 = 12 * 256      2560 = 20 * 128

A `Rotation` is R = diag(+-1) (A x B x C): random signs (QuIP#, arXiv 2402.04396) and a few small
factors, applied one after the other along a reshaped axis: k (a + b + c) instead of k^2 products a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_LARGEST_SYLVESTER = 64  # largest order of a factor


@dataclass(frozen=True)
class Rotation:
    """R `(k, k)` orthogonal, k = the product of the factors' orders. random: the order of the part
    that is a random orthogonal block if there is no Hadamard matrix (1: none)."""

    signs: torch.Tensor
    factors: tuple[torch.Tensor, ...]
    random: int = 1

    @property
    def size(self) -> int:
        return self.signs.shape[0]

    def columns(self, w: torch.Tensor) -> torch.Tensor:
        """`(..., m * k)` f32 -> each run of k columns times R: `w (I x R)`."""
        shape = w.shape
        x = w.reshape(-1, self.size) * self.signs.to(w.dtype)
        for factor in self.factors:  # the first factor's axis moves to the end each time, through all factors
            f = factor.to(w.dtype)
            x = x.reshape(x.shape[0], f.shape[0], -1).transpose(1, 2) @ f
            x = x.reshape(x.shape[0], -1)
        return x.reshape(shape)

    def rows(self, w: torch.Tensor) -> torch.Tensor:
        """`(m * k, ...)` f32 -> each run of k rows times R transposed: `(I x R)^T w`."""
        return self.columns(w.T).T.contiguous()

    def describe(self) -> str:
        orders = " x ".join(str(factor.shape[0]) for factor in self.factors)
        kind = "Hadamard" if self.random == 1 else f"random orthogonal {self.random}, then Hadamard"
        return f"{kind} of order {self.size} = {orders}, random signs"


def rotation(k: int, generator: torch.Generator) -> Rotation:
    """The randomized rotation of order k >= 1: Hadamard if one is known, else with a random orthogonal
    block for the odd part of k."""
    signs = (torch.randint(0, 2, (k,), generator=generator) * 2 - 1).float()
    odd = k // (k & -k)
    for order in (odd << p for p in range((k & -k).bit_length())):
        first = hadamard(order)
        if first is not None:
            return Rotation(signs, (*_own(first), *_sylvester_factors(k // order)))
    noise = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    block = (q * r.diagonal().sign()).float()  # the signs make the block uniform over all orthogonal ones
    return Rotation(signs, (block, *_sylvester_factors(k // odd)), odd)


def hadamard(order: int) -> torch.Tensor | None:
    """`(order, order)` of +-1 f32 for orders 1, 2, q + 1 and 2 (q + 1); None for any other."""
    if order == 1:
        return torch.ones(1, 1)
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    if order % 4 == 0 and _is_prime(order - 1):
        border = _bordered(order - 1, -1.0)
        return border + torch.eye(order)
    half = order // 2
    if order % 4 == 0 and (half - 1) % 4 == 1 and _is_prime(half - 1):
        zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        other = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        return torch.kron(_bordered(half - 1, 1.0), other) + torch.kron(torch.eye(half), zero)
    return None


def _bordered(q: int, sign: float) -> torch.Tensor:
    """`(q + 1, q + 1)`: the conference matrix of the quadratic residues modulo a prime q."""
    character = torch.full((q,), -1.0)
    character[torch.arange(1, q).square() % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1)
    matrix[0, 1:], matrix[1:, 0] = 1.0, sign
    matrix[1:, 1:] = character[(index[:, None] - index) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _own(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (matrix / matrix.shape[0] ** 0.5,) if matrix.shape[0] > 1 else ()


def _sylvester_factors(k: int) -> tuple[torch.Tensor, ...]:
    """Orthonormal Sylvester factors whose orders, at most 64 each, multiply to the power of two k."""
    factors = []
    while k > 1:
        order = min(k, _LARGEST_SYLVESTER)
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < order:
            matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        factors.append(matrix / order**0.5)
        k //= order
    return tuple(factors)
