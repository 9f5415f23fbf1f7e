"""What SmoothQuant, AWQ, equalization and clipping claim, on planted outliers; and what they refuse."""

from collections.abc import Mapping

import pytest
import torch

from fewbits.calibrate.stats import Stats
from fewbits.errors import CalibrationError
from fewbits.formats import FORMATS
from fewbits.formats.base import Format
from fewbits.transforms import Pair, applied, awq, clipped, equalize, rescaled, smooth
from fewbits.transforms.equalize import CHANGE, ranges
from fewbits.transforms.loss import ratio
from fewbits.transforms.pairs import Choice, Rows, Vector

N, K = 48, 128
NORM = Pair("norm", K, ("q", "k"), vector=Vector("norm", torch.bfloat16))
INNER = Pair("v > o", K // 2, ("o",), rows=Rows("v"), head=16, repeat=2)
PAIRS = [NORM, INNER]
LOUD = slice(5, None, 32)


def inputs(loud: float) -> torch.Tensor:
    """`(256, k)` correlated inputs, one column in 32 of them `loud` times larger."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, K, generator=generator) @ torch.randn(K, K, generator=generator) / K**0.5
    x[:, LOUD] *= loud
    return x


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"norm": (K,), "q": (N, K), "k": (N, K), "v": (K // 2, K), "o": (N, K)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return found | {"norm": (1 + 0.1 * found["norm"]).bfloat16().float()}


def stats(x: torch.Tensor) -> dict[str, Stats]:
    return dict.fromkeys(("q", "k", "o"), Stats.of(x))


def formats(name: str) -> dict[str, Format | None]:
    return dict.fromkeys(("q", "k", "o"), FORMATS.get(name))


def output_error(
    chosen: list[Choice], x: torch.Tensor, kind: str, activation_levels: int | None = None
) -> dict[str, float]:
    """Relative error of each consumer's output; both sides written out here, not taken from the package."""
    new = {**weights(), **applied(weights(), chosen)}
    columns = {name: pair.spread(scale) for pair, scale in chosen for name in pair.consumers}
    found = {}
    for name in ("q", "k", "o"):
        w = weights()[name]
        a = x / columns.get(name, torch.ones(K))
        if activation_levels is not None:
            scale = a.abs().amax(1, keepdim=True) / activation_levels
            a = (a / scale).round() * scale
        q = FORMATS.get(kind).encode(new[name], a.square().mean(0)).decode()
        found[name] = float((a @ q.T - x @ w.T).norm() / (x @ w.T).norm())
    return found


@pytest.mark.parametrize("given", ["alpha", "statistics", "samples"])
def test_smoothquant_makes_int8_activations_with_outliers_bearable(given: str) -> None:
    x = inputs(100.0)
    options: Mapping = {
        "alpha": {"alpha": 0.5},
        "statistics": {},
        "samples": {"samples": dict.fromkeys(("q", "k", "o"), x)},
    }[given]
    chosen = smooth(weights(), PAIRS, stats(x), formats("int8_channel"), **options)
    assert [pair for pair, _ in chosen] == PAIRS
    before = output_error([], x, "int8_channel", 127)
    after = output_error(chosen, x, "int8_channel", 127)
    assert all(after[name] < 0.6 * before[name] for name in before)


def test_a_searched_alpha_is_no_worse_than_any_given_one() -> None:
    x = inputs(100.0)
    samples = dict.fromkeys(("q", "k", "o"), x)
    kind = formats("int8_channel")
    searched = output_error(
        smooth(weights(), [INNER], stats(x), kind, samples=samples), x, "int8_channel", 127
    )
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        given = output_error(smooth(weights(), [INNER], stats(x), kind, alpha=alpha), x, "int8_channel", 127)
        assert searched["o"] <= given["o"] * (1 + 1e-6)  # the same sum in another order


@pytest.mark.parametrize(
    ("kind", "most"), [("int4_g32", 0.7), ("q4_0", 0.7), ("int3_g64", 0.7), ("nf4", 0.9), ("q4_1", 1.0)]
)
def test_awq_lowers_the_output_error_of_few_bits(kind: str, most: float) -> None:
    """Least where the format has a scale and an offset to fit each group of 32 under the same weights."""
    x = inputs(30.0)
    chosen = awq(weights(), PAIRS, stats(x), formats(kind))
    assert [pair for pair, _ in chosen] == PAIRS
    before, after = output_error([], x, kind), output_error(chosen, x, kind)
    assert all(after[name] < most * before[name] for name in before)
    for pair, scale in chosen:  # loud columns are the ones that grow
        loud = torch.zeros(K)
        loud[LOUD] = 1
        is_loud = pair.gathered(loud, "amax") > 0
        assert scale[is_loud].log().mean() > scale[~is_loud].log().mean()


def test_awq_leaves_alone_what_gains_nothing() -> None:
    """With all weights on the grid, no scale can be better than none."""
    exact = {name: w.sign() for name, w in weights().items()}
    assert awq(exact, PAIRS, stats(inputs(10.0)), formats("q8_0"), steps=4) == []


def test_awq_takes_the_algorithm_that_will_choose_the_codes() -> None:
    seen = set()

    def plain(w: torch.Tensor, format: Format, known: Stats) -> object:
        seen.add((format.name, known.hessian is not None))
        return format.encode(w, None, search=False)

    awq(weights(), PAIRS, stats(inputs(10.0)), formats("int4_g32"), steps=2, quantize=plain)
    assert seen == {("int4_g32", True)}


def test_equalized_ranges_match() -> None:
    loud = weights()
    loud["v"][3] *= 50
    loud["q"][:, 7] *= 20
    chosen = equalize(loud, PAIRS)
    new = {**loud, **applied(loud, chosen)}
    for pair in PAIRS:
        before, after = (torch.log(torch.div(*ranges(w, pair))) for w in (loud, new))
        assert before.std() > 0.2
        # Within the change at which the rounds stop, and bf16's half ulp of the norm (2^-9).
        assert (after - after.mean()).abs().max() < 2 * CHANGE + 2**-8


def test_a_dead_column_keeps_its_scale() -> None:
    top, below = torch.tensor([4.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])
    assert ratio(top, 0.5, below, 0.5).tolist() == [2.0, 1.0, 1.0]
    dead = weights()
    dead["v"][3] = 0
    dead["o"][:, 9] = 0
    x = inputs(10.0)
    x[:, 20] = 0
    for chosen in (
        equalize(dead, PAIRS),
        smooth(dead, PAIRS, stats(x), formats("int8_channel"), alpha=0.5),
        awq(dead, PAIRS, stats(x), formats("int4_g32"), steps=2),
    ):
        assert all(bool((torch.isfinite(scale) & (scale > 0)).all()) for _, scale in chosen)


def test_clipping_lowers_the_error_of_plain_rounding() -> None:
    x = inputs(1.0)
    known, w = Stats.of(x), weights()["o"]
    w[:, ::40] *= 4
    for kind in ("int4_g32", "q4_0", "int4_g128"):
        format = FORMATS.get(kind)
        before, after = (
            float(((format.encode(v, known.mean_square).decode() - w) @ x.T).norm())
            for v in (w, clipped(w, format, known))
        )
        assert after < before
    assert bool((clipped(w, format, known).abs() <= w.abs()).all())


# ---- refusals ------------------------------------------------------------------------------------


def test_missing_statistics_are_named() -> None:
    known = stats(inputs(1.0))
    del known["k"]
    for transform in (awq, smooth):
        with pytest.raises(CalibrationError, match="norm: no statistics of the input of k"):
            transform(weights(), PAIRS, known, formats("int4_g32"))


def test_what_statistics_do_not_hold_is_said() -> None:
    x = inputs(1.0)
    light = dict.fromkeys(("q", "k", "o"), Stats.of(x, hessian=False))
    with pytest.raises(CalibrationError, match="no Hessian"):
        awq(weights(), PAIRS, light, formats("int4_g32"))
    with pytest.raises(CalibrationError, match="needs a Hessian"):
        clipped(weights()["o"], FORMATS.get("int4_g32"), light["o"])
    imatrix = dict.fromkeys(("q", "k", "o"), Stats(9, None, x.square().mean(0)))
    with pytest.raises(CalibrationError, match="no largest magnitudes"):
        smooth(weights(), PAIRS, imatrix, formats("int8_channel"), alpha=0.5)
    with pytest.raises(CalibrationError, match="no sample of the input of k"):
        smooth(weights(), [NORM], stats(x), formats("int8_channel"), samples={"q": x})
    with pytest.raises(CalibrationError, match="fp8_dynamic is not modelled"):
        smooth(weights(), PAIRS, stats(x), formats("int8_channel"), activation="fp8_dynamic")
    with pytest.raises(CalibrationError, match=r"alpha is 1\.5"):
        smooth(weights(), PAIRS, stats(x), formats("int8_channel"), alpha=1.5)


def test_consumers_without_format_or_tokens_do_not_count() -> None:
    x = inputs(10.0)
    unseen = Stats.of(x[:0])
    known = {"q": Stats.of(x), "k": unseen, "o": unseen}
    kinds = {**formats("int4_g32"), "q": None}
    assert awq(weights(), PAIRS, known, kinds) == []
    only_q = awq(weights(), [NORM], known, formats("int4_g32"))
    alone = awq(weights(), [NORM], {"q": Stats.of(x)}, {"q": FORMATS.get("int4_g32")})
    assert torch.equal(only_q[0][1], alone[0][1])


def test_a_pair_scaled_twice_has_the_statistics_of_the_product() -> None:
    known, scale = Stats.of(inputs(3.0)), torch.rand(K // 2, generator=torch.Generator().manual_seed(0)) + 0.5
    twice = rescaled(rescaled(known, INNER, scale), INNER, 1 / scale)
    torch.testing.assert_close(twice.hessian, known.hessian)
