"""Capture: statistics are those of the inputs, shared where inputs are, and refuse what is not finite."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fewbits.blocks.activations import Activations
from fewbits.blocks.block import Block
from fewbits.blocks.model import BlockModel
from fewbits.calibrate.capture import (
    MANY,
    PANEL,
    Capture,
    FloatStream,
    Sums,
    add_outer,
    advance,
    capture,
    mirror,
)
from fewbits.calibrate.stats import Stats
from fewbits.errors import CalibrationError, FileError, ModelError
from fewbits.files.open import open_checkpoint
from fewbits.model.sites import Site, sites
from tests.tiny import VOCAB, change_weights, save_tiny

FIVE = (
    "LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM",
)  # fmt: skip
Ready = tuple[Block, list[torch.Tensor], list[Site]]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ready]:
    """Architecture -> a new first block, four batches of embedded tokens, the sites of the block."""
    made: dict[str, tuple[BlockModel, list[torch.Tensor], list[Site]]] = {}

    def make(name: str) -> Ready:
        if name not in made:
            checkpoint = open_checkpoint(save_tiny(name, tmp_path_factory.mktemp(name)))
            model = BlockModel(checkpoint)
            tokens = torch.randint(0, VOCAB, (4, 2, 24), generator=torch.Generator().manual_seed(0))
            found = [site for site in sites(checkpoint) if site.block == 0]
            made[name] = model, [model.embed(batch) for batch in tokens], found
        model, batches, found = made[name]
        return model.block(0, model.weights(0)), batches, found

    return make


def inputs_of(block: Block, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each site reads over all batches."""
    parts: dict[str, list[torch.Tensor]] = {}
    for hidden in batches:
        block.watched(hidden, lambda name, x: parts.setdefault(name, []).append(x))
    return {name: torch.cat(found) for name, found in parts.items()}


def assert_same(got: Stats, want: Stats) -> None:
    """Sums of t terms in another order: t f32 roundings of the largest entry at most, each 6e-8."""
    assert got.count == want.count
    assert torch.equal(got.absmax, want.absmax)
    for a, b in (
        (got.mean_square, want.mean_square),
        (got.hessian, want.hessian),
        (got.mismatch, want.mismatch),
    ):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a - b).abs().max() <= want.count * 6e-8 * want.mean_square.max()


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIVE)
def test_statistics_are_those_of_the_inputs_and_shared_as_the_names_say(
    name: str, ready: Callable[[str], Ready]
) -> None:
    block, batches, found = ready(name)
    read = inputs_of(block, batches)
    captured = capture(block, batches, found)
    assert captured.unseen == () and captured.notes == ()
    assert captured.stats.keys() == {site.name for site in found}
    for site in found:
        assert_same(captured.stats[site.name], Stats.of(read[site.name]))
        for other in found:
            shared = captured.stats[site.name] is captured.stats[other.name]
            assert shared == (site.group == other.group)


def test_without_hessians_the_rest_is_the_same(ready: Callable[[str], Ready]) -> None:
    block, batches, found = ready("LlamaForCausalLM")
    read = inputs_of(block, batches)
    for name, stats in capture(block, batches, found, hessian=False).stats.items():
        assert_same(stats, Stats.of(read[name], hessian=False))


def test_statistics_of_two_texts_merge_to_those_of_both(ready: Callable[[str], Ready]) -> None:
    block, batches, found = ready("MixtralForCausalLM")
    whole = capture(block, batches, found).stats
    first, second = (capture(block, part, found).stats for part in (batches[:1], batches[1:]))
    for name in whole:
        assert_same(first[name] + second[name], whole[name])


@pytest.mark.parametrize("k", [1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 88])
def test_panels_sum_the_whole_product_and_it_is_symmetric(k: int) -> None:
    x = torch.randn(2, 40, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    h = torch.zeros(k, k, dtype=torch.float64)
    for part in x:
        add_outer(h, part)
    mirror(h)
    torch.testing.assert_close(h, x.flatten(0, 1).T @ x.flatten(0, 1))
    assert torch.equal(h, h.T)


def test_sums_of_thousands_of_tokens_are_those_in_f64_whatever_the_cpu_multiplies_in() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(MANY, 64, generator=generator) * torch.logspace(-2, 2, 64)
    floats = x + 0.1 * torch.randn(MANY, 64, generator=generator)
    before = torch.get_float32_matmul_precision()
    sums = Sums(64, True, True, x.device)
    sums.add(x, floats)
    found = sums.stats()
    assert torch.get_float32_matmul_precision() == before
    sizes = x.double().square().mean(0).sqrt()
    for got, left in ((found.hessian, x), (found.mismatch, floats - x)):
        want = left.double().T @ x.double() / MANY
        bound = left.double().square().mean(0).sqrt()[:, None] * sizes
        assert got is not None
        # At most 2^-7 of each product, the signs by chance.
        assert ((got - want).abs() / bound).max() < 4 * 2**-7 / MANY**0.5


# ---- two streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_drift_is_how_far_the_streams_are_apart_and_outputs_come_with_it(
    name: str, ready: Callable[[str], Ready]
) -> None:
    block, batches, found = ready(name)
    floats = [hidden + 0.1 * hidden.roll(1, -1) for hidden in batches]
    outputs: list[torch.Tensor] = []
    float_outputs: list[torch.Tensor] = []
    captured = capture(
        block, batches, found, floats=FloatStream(floats, outputs=float_outputs), outputs=outputs
    ).stats
    read, wanted = inputs_of(block, batches), inputs_of(block, floats)
    for site in found:
        other = wanted[site.name] if site.expert is None else None
        assert_same(captured[site.name], Stats.of(read[site.name], floats=other))
    for got, streams in ((outputs, batches), (float_outputs, floats)):
        assert all(torch.equal(y, block(x)) for y, x in zip(got, streams, strict=True))


def test_equal_streams_do_not_drift_and_may_be_overwritten(ready: Callable[[str], Ready]) -> None:
    block, batches, found = ready("LlamaForCausalLM")
    x, floats = Activations(batches, limit=0), Activations(batches)
    stats = capture(block, x, found, floats=FloatStream(floats, outputs=floats), outputs=x).stats
    assert all(s.mismatch is not None and not s.mismatch.any() for s in stats.values())
    for i, hidden in enumerate(batches):
        assert torch.equal(x[i], block(hidden)) and torch.equal(floats[i], block(hidden))


def test_streams_of_other_shapes_are_refused(ready: Callable[[str], Ready]) -> None:
    block, batches, found = ready("LlamaForCausalLM")
    with pytest.raises(CalibrationError, match=r"\(24, 256\).*\(48, 256\)"):
        capture(block, batches, found, floats=FloatStream([hidden[:1] for hidden in batches]))


def test_advance_runs_the_block(ready: Callable[[str], Ready]) -> None:
    block, batches, _ = ready("LlamaForCausalLM")
    stream = Activations(batches)
    advance(block, stream, stream)
    assert all(torch.equal(y, block(x)) for y, x in zip(stream, batches, strict=True))


# ---- who is seen ---------------------------------------------------------------------------------


def test_an_expert_that_no_token_reaches_is_named(ready: Callable[[str], Ready]) -> None:
    """One token, two experts of four."""
    block, batches, found = ready("Qwen3MoeForCausalLM")
    captured = capture(block, [batches[0][:1, :1]], found)
    idle = {site.expert for site in found if site.name in captured.unseen}
    assert len(idle) == 2 and None not in idle
    for site in found:
        assert (site.name in captured.stats) == (site.expert not in idle)
        assert site.name not in captured.stats or captured.stats[site.name].count == 1


def test_a_pass_ends_with_the_last_site_wanted(ready: Callable[[str], Ready]) -> None:
    """What lies behind may even be broken; where outputs are wanted, it is met."""
    block, batches, found = ready("LlamaForCausalLM")
    want = capture(block, batches, found).stats
    down = "model.layers.0.mlp.down_proj.weight"
    block.set({down: torch.full_like(block.weight(down), torch.nan)})
    for role in ("v", "o"):
        only = [site for site in found if site.role == role]
        for floats in (None, FloatStream(batches)):
            got = capture(block, batches, only, floats=floats).stats
            assert torch.equal(got[only[0].name].mean_square, want[only[0].name].mean_square)
            with pytest.raises(CalibrationError, match="NaN"):
                capture(block, batches, only, floats=floats, outputs=[])


class Pretending:
    """A block whose sites read what a script says: (site, input) for each batch."""

    name, names = "block", ("a.q_proj.weight", "a.k_proj.weight", "b.up_proj.weight")

    def __init__(self, *script: list[tuple[str, int]]) -> None:
        self.script = iter(script)

    def watched(self, hidden: torch.Tensor, watch: Callable[[str, torch.Tensor], None]) -> torch.Tensor:
        inputs = [torch.ones(2, 4), torch.ones(2, 4)]
        for name, i in next(self.script):
            watch(name, inputs[i])
        return hidden

    def capture(self, batches: int) -> Capture:
        found = [Site(name, (4, 4), "q", 0, name.split(".")[0]) for name in self.names]
        return capture(self, [torch.ones(1, 2, 4)] * batches, found, outputs=[])  # type: ignore[arg-type]


def test_what_is_observed_wins_over_the_names_and_is_noted() -> None:
    q, k, up = Pretending.names
    captured = Pretending([(q, 0), (k, 1), (up, 1)]).capture(1)
    assert captured.stats[k] is captured.stats[up] and captured.stats[q] is not captured.stats[k]
    assert len(captured.notes) == 2
    assert f"{k}, {up} read one input" in captured.notes[0]
    assert f"{q}, {k} read different inputs" in captured.notes[1]


def test_inputs_that_are_shared_in_one_batch_only_are_refused() -> None:
    q, k, up = Pretending.names
    for first, second in (((0, 0), (0, 1)), ((0, 1), (0, 0))):
        scripts = [[(q, a), (k, b), (up, 1)] for a, b in (first, second)]
        with pytest.raises(CalibrationError, match="in one batch"):
            Pretending(*scripts).capture(2)


def test_nothing_to_see_and_strange_sites_are_refused(ready: Callable[[str], Ready]) -> None:
    block, _, found = ready("LlamaForCausalLM")
    with pytest.raises(CalibrationError, match="no input reached any of 7 sites"):
        capture(block, [], found)
    with pytest.raises(ModelError, match="lm_head"):
        capture(block, [], [Site("lm_head.weight", (4, 4), "output", None, "lm_head:in")])


# ---- not finite ----------------------------------------------------------------------------------


def test_activations_that_are_not_finite_are_refused_with_block_and_site(tmp_path: Path) -> None:
    up = "model.layers.1.mlp.up_proj.weight"
    model = BlockModel(
        open_checkpoint(
            change_weights(save_tiny("LlamaForCausalLM", tmp_path), {up: lambda w: w * torch.nan})
        )
    )
    hidden = model.embed(torch.ones(1, 4, dtype=torch.int64))
    advance(model.block(0, model.weights(0)), [hidden], [])
    with pytest.raises(
        CalibrationError, match=r"model.layers.1: batch 0: 1024 of 1024 .* is model.layers.1.mlp.down"
    ):
        advance(model.block(1, model.weights(1)), [hidden], [])
    with pytest.raises(
        CalibrationError, match=r"layers.0: .* 1 were so on entering; .* model.layers.0.self_attn.q"
    ):
        hidden[0, 3, 0] = torch.inf
        advance(model.block(0, model.weights(0)), [hidden], [])


def test_inputs_whose_squares_overflow_are_refused(ready: Callable[[str], Ready]) -> None:
    block, batches, found = ready("LlamaForCausalLM")
    up, down = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down"))
    block.set({up: block.weight(up) * 1e22, down: block.weight(down) * 1e-22})
    for hessian in (True, False):
        with pytest.raises(
            CalibrationError, match=r"mlp.down_proj.weight: inputs up to .*e\+2. have no finite"
        ):
            capture(block, batches, found, hessian)


# ---- activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fit", [0, 1, 3, 4])
def test_activations_come_back_from_memory_and_from_disk(
    fit: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    batches = [torch.randn(2, 3 + i, 5).to(dtype) for i in range(4)]
    limit = sum(x.nbytes for x in batches[:fit])
    with Activations(batches, limit, tmp_path) as stream:
        assert list(tmp_path.iterdir()) == []  # the file has no name: a kill leaves nothing
        assert stream.nbytes_in_memory == limit and bool(stream.nbytes_on_disk) == (fit < 4)
        held = stream[3]
        for again in range(2):
            assert len(stream) == 4
            assert all(torch.equal(x, y) and x.dtype == dtype for x, y in zip(stream, batches, strict=True))
            if not again:
                batches = [-x for x in batches]
                for i, x in enumerate(batches):
                    stream[i] = x
        assert held.shape == (2, 6, 5)
        with pytest.raises(ValueError, match="cannot replace"):
            stream[0] = torch.zeros(1, 3, 5, dtype=dtype)


def test_activations_give_their_disk_and_descriptors_back(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    stream = Activations([torch.ones(1, 2, 3)] * 3, 0, tmp_path)
    for _ in range(20):
        assert all(bool(x.any()) for x in stream)
    del stream
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_is_too_small_is_said_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileError, match="no scratch file can be made there"):
        Activations([torch.ones(1, 2, 3)], 0, tmp_path / "missing")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=23))
    with pytest.raises(FileError, match=r"need 24 more bytes of disk, 23 are free"):
        Activations([torch.ones(1, 2, 3)], 0, tmp_path)
    Activations([torch.ones(1, 2, 3)], 24, tmp_path)
