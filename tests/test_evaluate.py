"""Evaluation: parity is exact, the windows are llama-perplexity's, the statistics those of their formulas."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.adapters.transformers import load_model
from fewbits.calibrate.sampling import draw
from fewbits.dtypes import F32
from fewbits.errors import CalibrationError, FewbitsError, FileError, ModelError
from fewbits.evaluation import Settings, Simulation, Text, compare, evaluate, memory_need, self_text
from fewbits.evaluation.compare import cut
from fewbits.evaluation.generation import first_divergence, greedy, repetition_loop
from fewbits.evaluation.scores import compare as compare_scores
from fewbits.evaluation.scores import fidelity, mean, perplexity
from fewbits.files.checkpoint import LazyTensor
from fewbits.files.open import open_checkpoint
from fewbits.memory import resident_memory
from fewbits.runtime.runner import Blockwise, Whole, needs_side_by_side
from fewbits.workflow.request import Request
from fewbits.workflow.run import run
from tests.tiny import save_tiny

SMALL = Settings(context=32, prompts=2, prompt_tokens=6, new_tokens=8)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("model") / "reference"))


@pytest.fixture(scope="module")
def text(reference):
    vocabulary = reference.config["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    return Text(torch.randint(vocabulary, (130,), generator=generator), "random tokens")


def noisy(checkpoint, size, name):
    """The same checkpoint with noise of relative `size` on each matrix."""

    def changed(tensor):
        def load():
            w = tensor.load().float()
            noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
            return w + size * w.std() * noise if w.ndim == 2 else w

        return LazyTensor(tensor.name, tensor.shape, F32, tensor.nbytes, tensor.file, load)

    tensors = {key: changed(tensor) for key, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, path=checkpoint.path.with_name(name))


def test_a_quantized_equal_to_its_reference_is_at_parity_exactly(reference, text):
    found = evaluate(reference, [reference], text, SMALL)
    far = found.quantized_models[0].fidelity
    assert (far.kl, far.kl_median, far.kl_99, far.kl_999, far.kl_max) == ((0.0, 0.0), 0.0, 0.0, 0.0, 0.0)
    assert (far.agreement, far.perplexity_ratio) == ((1.0, 0.0), (1.0, 0.0))
    assert found.quantized_models[0].perplexity == found.reference.perplexity
    assert [c.diverges_at for c in found.quantized_models[0].continuations] == [None, None]
    assert found.tokens_scored == 4 * 15


def test_more_noise_costs_more_by_every_measure(reference, text):
    quantized_models = [noisy(reference, size, f"noise-{size}") for size in (0.01, 0.1, 1.0)]
    found = evaluate(reference, quantized_models, text, SMALL)
    by_size = [quantized.fidelity for quantized in found.quantized_models]
    for measure in ("kl_median", "kl_99", "kl_max"):
        values = [getattr(far, measure) for far in by_size]
        assert values == sorted(values) and values[0] > 0
    assert by_size[0].kl.value < by_size[1].kl.value < by_size[2].kl.value
    assert by_size[0].agreement.value > by_size[2].agreement.value
    assert [quantized.name for quantized in found.quantized_models] == [
        "noise-0.01",
        "noise-0.1",
        "noise-1.0",
    ]


def test_perplexity_equals_a_plain_loop_over_the_text(reference, text):
    """The plainest reading of llama-perplexity: position i of the second half predicts token i + 1."""
    found = evaluate(reference, [], text, SMALL)
    model, losses = load_model(reference, torch.float32), []
    for start in range(0, 128, 32):
        window = text.tokens[start : start + 32]
        with torch.inference_mode():
            log_p = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        losses += [-log_p[i, window[i + 1]] for i in range(16, 31)]
    expected = torch.stack(losses).mean().exp()
    assert found.reference.perplexity.value == pytest.approx(float(expected), rel=1e-6)  # f32 log-softmax


@given(st.integers(3, 40), st.integers(0, 200), st.none() | st.integers(1, 5), st.none() | st.integers(0, 9))
def test_windows_do_not_overlap_and_keep_every_token(context, length, most, bos):
    text = Text(torch.arange(length), "counted", bos)
    limits = Settings(context=context, max_windows=most)
    if length < context:
        with pytest.raises(CalibrationError, match=f"{length} tokens fill no window of {context}"):
            cut(text, limits, 1000)
        return
    windows = cut(text, limits, 1000)
    n = min(length // context, most or length)
    assert windows.shape == (n, context)
    assert torch.equal(windows[:, 1:], torch.arange(n * context).view(n, context)[:, 1:])
    heads = torch.arange(n) * context if bos is None else torch.full((n,), bos)
    assert torch.equal(windows[:, 0], heads)
    assert torch.equal(text.tokens, torch.arange(length))


@pytest.mark.parametrize(
    ("tokens", "limits", "parts"),
    [
        (torch.arange(7), Settings(context=8), ["7 tokens", "window of 8"]),
        (torch.tensor([1, 2, 99]), Settings(context=3), ["token 99", "vocabulary of 50"]),
        (torch.tensor([1, -2, 3]), Settings(context=3), ["token -2"]),
        (torch.arange(9), Settings(context=8, score_from=7), ["score_from 7", "0 ... 6"]),
        (torch.arange(9.0), Settings(context=8, max_windows=0), ["float32", "max_windows is 0"]),
    ],
)
def test_text_that_cannot_be_scored_is_refused_with_numbers(tokens, limits, parts):
    with pytest.raises(CalibrationError) as caught:
        cut(Text(tokens, "here"), limits, 50)
    assert all(part in str(caught.value) for part in [*parts, "here"])


def test_models_that_cannot_be_compared_are_all_named(reference, text):
    other = replace(
        reference, config={**reference.config, "vocab_size": 7}, path=reference.path.with_name("small")
    )
    empty = replace(reference, config={}, path=reference.path.with_name("unknown"))
    with pytest.raises(ModelError) as caught:
        evaluate(reference, [other, empty], text, replace(SMALL, context=100_000))
    for part in ("small: a vocabulary of 7", "unknown: its config names no vocab_size", "context 100000"):
        assert part in str(caught.value)


def test_a_model_whose_output_is_not_finite_is_an_error(reference, text):
    broken = noisy(reference, float("nan"), "broken")
    with pytest.raises(ModelError, match="broken"):
        evaluate(reference, [broken], text, SMALL)
    with pytest.raises(CalibrationError, match=r"not finite at token 1: \d+ of"):
        self_text(broken, 4, context=4)


def test_a_full_scratch_disk_is_an_error_with_both_numbers(reference, text, monkeypatch):
    usage = type("Usage", (), {"free": 1024})
    monkeypatch.setattr(compare.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FileError, match=r"free: 1\.0 KiB"):
        evaluate(reference, [], text, SMALL)


def test_nothing_is_left_on_the_scratch_disk(reference, text, tmp_path):
    evaluate(reference, [reference], text, replace(SMALL, scratch=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_json_and_table_hold_every_model(reference, text):
    found = evaluate(
        reference, [noisy(reference, 0.1, "quantized")], text, SMALL, decode=lambda tokens: f"<{len(tokens)}>"
    )
    body = json.loads(found.to_json())
    assert body["quantized_models"][0]["fidelity"]["kl"][0] == found.quantized_models[0].fidelity.kl.value
    assert body["quantized_models"][0]["continuations"][0]["prompt"] == "<6>"
    for part in ("reference", "quantized", "random tokens", "60 tokens scored"):
        assert part in found.table()


def test_progress_counts_every_stage_to_its_end(reference, text):
    seen = {}
    evaluate(
        reference,
        [noisy(reference, 0.1, "quantized")],
        text,
        SMALL,
        progress=lambda *step: seen.update([(step[0], step[1:])]),
    )
    assert seen == {
        "reference: windows": (4, 4),
        "reference: generating": (8, 8),
        "quantized: windows": (4, 4),
        "quantized: generating": (8, 8),
    }


logits = st.integers(0, 2**31).map(
    lambda seed: torch.randn(2, 40, 33, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
)


@settings(deadline=None)
@given(logits)
def test_scores_equal_their_formulas(pair):
    p, q = pair
    targets = torch.arange(40) % 33
    scores = compare_scores(p, q, targets)
    reference = torch.nn.functional.kl_div(q.double(), p.double(), log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(scores.kl, reference, rtol=1e-12, atol=1e-12)  # f64, another order of sums
    assert float(scores.kl.min()) > -1e-6  # p sums to 1 within f32 rounding only
    far = fidelity(scores)
    assert far.kl_median <= far.kl_99 <= far.kl_999 <= far.kl_max
    ratio = perplexity(scores.nll_quantized).value / perplexity(scores.nll_reference).value
    assert far.perplexity_ratio.value == pytest.approx(ratio, rel=1e-9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=50))
def test_standard_error_is_that_of_the_mean(values):
    value, error = mean(torch.tensor(values, dtype=torch.float64))
    n = len(values)
    assert value == pytest.approx(sum(values) / n, rel=1e-9, abs=1e-9)
    sample_variance = sum((x - value) ** 2 for x in values) / (n - 1)
    assert error**2 == pytest.approx(sample_variance / n, rel=1e-6, abs=1e-12)


tokens = st.lists(st.integers(0, 3), max_size=60)


@given(tokens, tokens)
def test_first_divergence_splits_what_is_shared(a, b):
    at = first_divergence(a, b)
    if at is None:
        assert a == b
    else:
        assert a[:at] == b[:at] and a[at : at + 1] != b[at : at + 1]


@given(tokens, st.lists(st.integers(0, 3), min_size=1, max_size=16), st.integers(3, 5))
def test_a_loop_at_the_end_is_found(before, unit, times):
    period = repetition_loop(before + unit * times)
    assert period is not None and period <= len(unit)


@given(tokens)
def test_what_is_called_a_loop_is_one(line):
    period = repetition_loop(line)
    if period is not None:
        assert line[-3 * period :] == line[-period:] * 3


@pytest.mark.parametrize(
    ("line", "period"),
    [([1, 2, 3], None), ([1, 1], None), ([5, 1, 1, 1], 1), ([1, 2] * 3, 2), ([1, 2] * 3 + [1], 2)],
)
def test_loops_by_hand(line, period):
    assert repetition_loop(line) == period


def test_greedy_with_a_cache_equals_greedy_without(reference, text):
    model = load_model(reference, torch.float32)
    prompts = text.tokens[:20].view(2, 10)
    plain = prompts
    with torch.inference_mode():
        for _ in range(5):
            plain = torch.cat([plain, model(input_ids=plain).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert greedy(model, prompts, 5) == plain[:, 10:].tolist()
    stop = plain[0, 11].item()
    assert greedy(model, prompts, 5, frozenset([stop]))[0] == plain[0, 10:12].tolist()


def test_sampled_text_is_repeatable_and_says_where_it_comes_from(reference):
    first, again = (self_text(reference, 40, seed=3, context=16) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert len(first.tokens) == 48 and first.tokens.dtype == torch.int64
    assert not torch.equal(first.tokens, self_text(reference, 40, seed=4, context=16).tokens)
    assert "sampled from the reference itself" in first.source and "seed 3" in first.source
    with pytest.raises(FewbitsError, match="0 tokens"):
        self_text(reference, 0)


def test_draws_follow_the_distribution():
    p = torch.zeros(700)  # more than two of the blocks that a draw sums over
    p[torch.tensor([1, 3, 255, 256, 699])] = torch.tensor([0.4, 0.2, 0.1, 0.2, 0.1])
    n = 20_000
    drawn = draw(p.log().expand(n, -1), torch.Generator().manual_seed(0)).flatten()
    drawn = drawn.bincount(minlength=700) / n
    # 5 standard deviations of a share are at most 5 * sqrt(0.25 / n)
    assert float((drawn - p).abs().max()) < 5 * (0.25 / n) ** 0.5
    assert drawn[p == 0].sum() == 0


def test_block_by_block_the_figures_are_the_same(tmp_path):
    """Two quantized models beside the float one, in the memory of a block of each."""
    source = save_tiny("LlamaForCausalLM", tmp_path / "m")
    for to in ("q4_0", "q8_0"):
        run(source, tmp_path / f"{to}.gguf", Request(to))
    made = [tmp_path / "q4_0.gguf", tmp_path / "q8_0.gguf"]
    tokens = Text(torch.randint(0, 300, (400,), generator=torch.Generator().manual_seed(0)), "random")
    short = Settings(context=40, prompts=2, prompt_tokens=4, new_tokens=4)
    whole = evaluate(source, made, tokens, short)
    # A tiny model takes less than the allowance for buffers: so much that it does not fit whole.
    models = [open_checkpoint(path) for path in (source, *made)]
    blocks = needs_side_by_side([Blockwise(model) for model in models], 10, 40)
    least = resident_memory() + blocks + 2**26
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Whole, "needs", lambda *given: blocks + 2**28)
        need = memory_need(models, tokens, replace(short, memory=least))
        assert need.way == "block by block, side by side" and need.peak - need.here == blocks
        parts = evaluate(source, made, tokens, replace(short, memory=least))
        with pytest.raises(ModelError, match=r"block by block .*; .* are free"):
            evaluate(source, made, tokens, replace(short, memory=least // 2))
        simulated = replace(short, memory=least, simulation=Simulation("int8_dynamic"))
        with pytest.raises(ModelError, match="simulated in a whole model"):
            evaluate(source, made, tokens, simulated)
    assert whole.not_generated is None and "do not fit the memory" in parts.table()
    assert {model.ran for model in (whole.reference, *whole.quantized_models)} == {"whole, float32"}
    assert parts.reference.perplexity.value == pytest.approx(whole.reference.perplexity.value, rel=1e-4)
    for a, b in zip(whole.quantized_models, parts.quantized_models, strict=True):
        assert b.ran == "block by block" and not b.continuations and a.continuations
        assert b.fidelity.kl.value == pytest.approx(a.fidelity.kl.value, rel=1e-2, abs=1e-7)
        assert b.fidelity.agreement == a.fidelity.agreement
    fine, coarse = parts.quantized_models[1].block_errors, parts.quantized_models[0].block_errors
    assert len(fine) == len(coarse) == 2 and all(0 < x < y < 1 for x, y in zip(fine, coarse, strict=True))
