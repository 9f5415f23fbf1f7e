"""Figures of merit of every number format: how they are measured, and the most that each may be.

figures.txt has a row a format: what it measured, rounded up to three digits. A format that does worse than
its own row fails; `python -m tests.contracts.figures` prints the rows anew, for a new format or a better one.

    constant     largest relative error of a constant weight
    error        |w' - w| / |w|, the worst of four seeds and of ragged shapes
    live         the same over every second column of one half, the only ones that have importance
    search       squared error after the search over that of the plain rule, the worst of four seeds
    importance   weighted squared error with the importance known over that without, mean of four seeds
    refit        how far scales and offsets are stored from where `refitted` is to put them, relative
    closed_form  squared error after refitting by least squares over that before, of three seeds together
    gradient     difference of values against their gradient, in 2^-24 of the sum of the values' magnitudes
    beyond       largest error over largest weight, where scales underflow or saturate
    smallest     from 2^smallest to 2^largest times the size of usual weights, `error` is what it is at 1,
    largest      to 2 %: scales neither underflow nor saturate
"""

from collections.abc import Callable
from functools import cache
from math import log2
from pathlib import Path

import torch

from fewbits.errors import FormatError
from fewbits.formats import FORMATS, Format
from tests.contracts.samples import ROWS, closed_form, columns_of, error, sample, uneven, weights

PARSED = [
    "int2_channel_asym_bf16",
    "int3_g7_asym",
    "int4_tensor_asym_float_f32",
    "int3_g32_actorder_bf16",
    "int4_g48_asym_actorder",
    "int5_g96_asym_float_bf16",
    "int6_tensor_asym_f32",
    "fp6_e3m2_g48",
    "fp4_e2m1_channel_bf16",
    "fp8_e5m2_g256_f32",
    "pow2_5_tensor_f32",
    "pow2_2_g33",
    "kmeans1_channel",
    "kmeans6_tensor",
]
NAMES = [*FORMATS, *PARSED]
# What any format must do, whatever its row says. The coarsest neighbours of a float with one mantissa bit
# are 4 and 6: an error of 1 in 5. Where scales underflow, a value may be anything between the least and the
# largest weight. Refitted powers of two: 1.5 * 2^e becomes 2^e. Two levels: sqrt(1 - 2 / pi) = 0.6 for normal
# weights, and somewhat more for these, with their outliers.
CEILINGS = {
    "constant": 0.2, "error": 0.7, "live": 0.7, "search": 1.0, "importance": 1.0, "refit": 1 / 3,
    "closed_form": 1.0, "gradient": 2.0, "beyond": 2.0,
}  # fmt: skip


def relative(w: torch.Tensor, decoded: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    return (error(w, decoded, importance) / error(w, torch.zeros_like(w), importance)) ** 0.5


def ratio(a: float, b: float) -> float:
    """a / b, where f32 can tell them apart."""
    return 1.0 if abs(a - b) <= 2**-24 * b else a / b


def constant(format: Format) -> float:
    worst = 0.0
    for value in torch.linspace(1, 2, 8):
        for w in (torch.full((ROWS, columns_of(format)), float(sign * value)) for sign in (1, -1)):
            worst = max(worst, float((format.encode(w).decode() / w - 1).abs().max()))
    return worst


def usual_error(format: Format) -> float:
    ragged = [(ROWS, k) for k in (1, 7, 37, 129, 257) if k % format.block == 0]
    shapes = [(1, format.block), (ROWS, format.block), (129, format.block), *ragged]
    samples = [sample(format, seed) for seed in range(4)] + [weights(k, n, k) for n, k in shapes]
    return max(relative(w, format.encode(w).decode()) for w in samples)


def live(format: Format) -> float:
    w = sample(format)
    counts = torch.zeros(w.shape[1])
    counts[: w.shape[1] // 2 : 2] = 1.0
    return relative(w, format.encode(w, counts).decode(), counts)


def search(format: Format) -> float:
    worst = 0.0
    for w in (sample(format, seed) for seed in range(4)):
        searched, plain = (error(w, format.encode(w, None, search).decode()) for search in (True, False))
        worst = max(worst, ratio(searched, plain))
    return worst


def importance(format: Format) -> float:
    """Of importances that spread over some decades."""
    ratios = []
    for seed in range(4):
        w = sample(format, seed)
        counts = torch.randn(w.shape[1], generator=torch.Generator().manual_seed(seed)).mul(3).exp()
        known, unknown = (error(w, format.encode(w, i).decode(), counts) for i in (counts, None))
        ratios.append(ratio(known, unknown))
    return sum(ratios) / len(ratios)


def refit(format: Format) -> float:
    """Half-way to the groups of another weight."""
    grid = format.fit(sample(format))
    (scale, offset), (far, deep) = (part.groups(ROWS) for part in (grid, format.fit(sample(format, 1))))
    scale = (scale + far) / 2
    offset = None if offset is None or deep is None else (offset + deep) / 2
    got, got_offset = grid.refitted(scale, offset).groups(ROWS)
    assert (offset is None) == (got_offset is None)
    pairs = [(got, scale)] if offset is None else [(got, scale), (got_offset, offset)]
    return max(float((got - wanted).norm() / wanted.norm()) for got, wanted in pairs)


def refit_in_closed_form(format: Format) -> float:
    before, after = 0.0, 0.0
    for seed in range(3):
        w = sample(format, seed)
        grid = format.fit(w, uneven(w.shape[1]), search=False)
        codes = grid.round(w)
        before += error(w, grid.value(codes))
        after += error(w, grid.refitted(*closed_form(w, grid, codes)).value(codes))
    return ratio(after, before)


def gradient(format: Format) -> float:
    """Along a direction of parameters the gradient of sum(c * value) is the difference of values, which are
    linear in each parameter."""
    w = sample(format)
    grid = format.fit(w, uneven(w.shape[1]))
    codes, parameters = grid.round(w), grid.parameters()
    generator = torch.Generator().manual_seed(0)
    c, worst = torch.randn(w.shape, generator=generator), 0.0
    for name, stored in parameters.items():
        leaf = stored.clone().requires_grad_()
        (c * grid.replaced({**parameters, name: leaf}).value(codes)).sum().backward()
        assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and bool(leaf.grad.any())
        by = stored.abs().mean() * torch.randn(stored.shape, generator=generator)
        ends = [
            (c * grid.replaced({**parameters, name: stored + h * by}).value(codes)).double() for h in (1, -1)
        ]
        moved, rate = float((ends[0] - ends[1]).sum() / 2), float((leaf.grad.double() * by).sum())
        worst = max(worst, abs(moved - rate) / float(sum(end.abs().sum() for end in ends)))
    return worst * 2**24


def beyond(format: Format) -> float:
    worst = 0.0
    for size in (1e-42, 1e-38, 1e-30, 1e-8, 1e6, 1e12, format.largest):
        if size <= format.largest:
            w = sample(format).clamp(-1, 1) * size
            decoded = format.encode(w).decode()
            assert bool(decoded.isfinite().all())
            worst = max(worst, float((decoded.double() - w).abs().max() / w.abs().max()))
    return worst


def at_size(format: Format, exponent: int) -> float:
    """The relative error of weights 2^exponent as large over that of those weights."""
    w = sample(format).clamp(-1, 1)
    scaled = w * 2.0**exponent
    large = relative(scaled.double(), format.encode(scaled).decode())
    return ratio(large, relative(w.double(), format.encode(w).decode()))


def range_end(format: Format, direction: int) -> int:
    exponent = 0
    try:
        while at_size(format, exponent + direction) <= 1.02 and -148 < exponent < 127:
            exponent += direction
    except FormatError:
        pass
    return exponent


MEASURES: dict[str, Callable[[Format], float]] = {
    "constant": constant,
    "error": usual_error,
    "live": live,
    "search": search,
    "importance": importance,
    "refit": refit,
    "closed_form": refit_in_closed_form,
    "gradient": gradient,
    "beyond": beyond,
}


@cache
def figures() -> dict[str, dict[str, float]]:
    """Format -> column of figures.txt -> its figure."""
    head, *rows = (line.split() for line in Path(__file__).with_suffix(".txt").read_text().splitlines())
    return {name: dict(zip(head[1:], map(float, row), strict=True)) for name, *row in rows}


def rounded_up(x: float) -> str:
    """To three significant digits."""
    if x in (0, 1):
        return f"{x:.0f}"
    unit = 10.0 ** (int(log2(x) // log2(10)) - 2)
    return f"{-(-x // unit) * unit:.3g}"


def rows() -> list[str]:
    lines = ["".join(["format".ljust(26), *(f" {name:>11}" for name in (*MEASURES, "smallest", "largest"))])]
    for name in NAMES:
        format = FORMATS.get(name)
        row = [rounded_up(measure(format)) for measure in MEASURES.values()]
        row += [str(range_end(format, direction)) for direction in (-1, 1)]
        lines.append("".join([name.ljust(26), *(f" {figure:>11}" for figure in row)]))
    return lines


if __name__ == "__main__":
    print(*rows(), sep="\n")
