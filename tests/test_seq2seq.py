"""Encoder-decoders: both stacks are calibrated on text, the decoder on what the quantized encoder gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits.adapters.as_loaded import as_loaded
from fewbits.adapters.transformers import head_of
from fewbits.calibrate.tokens import Tokens
from fewbits.evaluation import Settings, Text
from fewbits.files.open import open_checkpoint
from fewbits.model.sites import sites
from fewbits.release.verify import verify
from fewbits.runtime.runner import Blockwise
from tests.tiny import alike, save_random

SMALL = {
    "vocab_size": 320,
    "d_model": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
BART = SMALL | {f"{part}_{what}": size for part in ("encoder", "decoder")
                for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))}  # fmt: skip
T5 = SMALL | {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 96,
              "feed_forward_proj": "gated-gelu"}  # fmt: skip
WHISPER = BART | {"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "bart": ("AutoModelForSeq2SeqLM", BART, 2 * 6 + 2 * 10),
    "marian": ("AutoModelForSeq2SeqLM", BART, 2 * 6 + 2 * 10),
    "t5": ("AutoModelForSeq2SeqLM", T5, 2 * 7 + 2 * 11),
    "whisper": ("AutoModelForSpeechSeq2Seq", WHISPER, 2 * 10),
}
"""model type -> class, fields of its config, weights in the blocks that read text"""
WINDOWS = torch.randint(3, 300, (8, 24), generator=torch.Generator().manual_seed(0))


def saved(kind: str, folder: Path) -> Path:
    save_random(MODELS[kind][0], kind, MODELS[kind][1], folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    sound = {"input_features": torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))}
    given = sound if model.config.model_type == "whisper" else {"input_ids": WINDOWS[:2]}
    return model(**given, decoder_input_ids=WINDOWS[2:4]).logits


@pytest.mark.parametrize("kind", MODELS)
def test_every_block_is_calibrated_and_both_loaders_agree(kind: str, tmp_path: Path) -> None:
    path = saved(kind, tmp_path / "float")
    text = Tokens.of(WINDOWS, "random")
    receipt = fewbits.quantize(path, tmp_path / "int4", to="int4_g32", method="gptq", calibrate=text)
    coded = [row for row in receipt.tensors if row.format == "int4_g32"]
    assert len(coded) == MODELS[kind][2] and all(row.tokens == WINDOWS.numel() for row in coded)
    assert all(row.algorithm == "gptq" for row in coded) and receipt.coverage["share"] == 1
    told = [note for note in receipt.notes if "no text" in note]
    assert len(told) == (2 if kind == "whisper" else 0)  # its encoder stays in float; noise stands for it

    loaded = fewbits.load(tmp_path / "int4")
    fewbits.convert(tmp_path / "int4", tmp_path / "decoded", file="huggingface")
    decoded = getattr(transformers, MODELS[kind][0]).from_pretrained(tmp_path / "decoded").eval()
    assert type(loaded) is type(decoded) and alike(logits(loaded), logits(decoded))


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_output_and_reference_are_the_same_in_transformers(kind: str, tmp_path: Path) -> None:
    path = saved(kind, tmp_path / "float")
    fewbits.quantize(path, tmp_path / "out", to="int8_channel", effort="fast", verify=False)
    outcome = verify(tmp_path / "out", reference=open_checkpoint(path))
    assert outcome.verdict == outcome.reference.verdict == "same", outcome.lines()


@pytest.mark.parametrize("kind", MODELS)
def test_block_by_block_gives_the_logits_of_the_whole(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(kind, tmp_path))
    assert head_of(checkpoint) == "seq2seq"
    found = torch.stack(list(Blockwise(checkpoint).logits(WINDOWS[:2])))
    model = getattr(transformers, MODELS[kind][0]).from_pretrained(tmp_path).eval()
    given: dict[str, Any] = {"input_ids": WINDOWS[:2]}
    if kind == "whisper":
        noise = torch.randn((1, 24, 64), generator=torch.Generator().manual_seed(0))
        given = {"encoder_outputs": (noise.repeat(2, 1, 1),)}
    with torch.no_grad():
        assert alike(found, model(**given, decoder_input_ids=WINDOWS[:2]).logits)


def test_the_blocks_of_the_decoder_are_numbered_after_the_encoders(tmp_path: Path) -> None:
    found = {site.name: site for site in sites(as_loaded(open_checkpoint(saved("t5", tmp_path))))}
    first = found["decoder.block.1.layer.1.EncDecAttention.q.weight"]
    assert found["encoder.block.1.layer.0.SelfAttention.q.weight"].block == 1 and first.block == 3
    table = found["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert table.role == "position" and found["shared.weight"].role == "embed"


def test_evaluate_compares_the_decoders_tokens(tmp_path: Path) -> None:
    path = saved("bart", tmp_path / "float")
    fewbits.quantize(path, tmp_path / "out", to="int8_channel", effort="fast")
    text = Text(WINDOWS.flatten(), "random")
    found = fewbits.evaluate(path, [tmp_path / "out"], text, Settings(context=24, score_from=4))
    kl = found.quantized_models[0].fidelity
    assert kl is not None and 0 < kl.kl.value < 0.05
