"""Models that see: text calibrates the language model in them, the rest stays in float and says so."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits.adapters.as_loaded import as_loaded
from fewbits.adapters.transformers import head_of, load_model
from fewbits.algorithms import CalibrationWarning
from fewbits.calibrate.tokens import Tokens
from fewbits.evaluation import Settings, Text
from fewbits.files.open import open_checkpoint
from fewbits.model.sites import sites
from fewbits.plan import parse_rule
from tests.tiny import alike, save_random

TEXT = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
}  # fmt: skip
SEEING: dict[str, dict[str, Any]] = {
    "llava": {"text_config": TEXT, "vision_config": VISION, "vision_feature_select_strategy": "full",
              "vision_feature_layer": -1, "image_token_id": 319},
    "gemma3": {"text_config": TEXT | {"model_type": "gemma3_text", "head_dim": 16}, "vision_config": VISION,
               "image_token_id": 319, "boi_token_index": 317, "eoi_token_index": 318,
               "mm_tokens_per_image": 4},
    "internvl": {"text_config": TEXT, "image_token_id": 319, "downsample_ratio": 0.5, "vision_config": {
        **VISION, "model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]}},
}  # fmt: skip
TOWERS = {"llava": "vision_tower", "gemma3": "vision_tower", "internvl": "vision_tower"}
WINDOWS = torch.randint(3, 300, (8, 24), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def saved(kind: str, folder: Path) -> Path:
    save_random("AutoModelForImageTextToText", kind, SEEING[kind], folder)
    return folder


@torch.no_grad()
def logits(model: Any, image: bool) -> torch.Tensor:
    if not image:
        return model(input_ids=WINDOWS[:2]).logits
    places = 1 if model.config.model_type == "internvl" else 4
    ids = torch.cat([WINDOWS[:1, :3], torch.full((1, places), 319), WINDOWS[:1, 3:]], 1)
    more = {"token_type_ids": (ids == 319).long()} if model.config.model_type == "gemma3" else {}
    return model(input_ids=ids, pixel_values=PIXELS, **more).logits


@pytest.mark.parametrize("kind", SEEING)
def test_text_calibrates_the_language_model_and_the_tower_stays_in_float(kind: str, tmp_path: Path) -> None:
    path = saved(kind, tmp_path / "float")
    text = Tokens.of(WINDOWS, "random")
    receipt = fewbits.quantize(path, tmp_path / "int4", to="int4_g32", method="gptq", calibrate=text)
    assert receipt.coverage["share"] == 1
    coded = [row for row in receipt.tensors if row.format == "int4_g32"]
    assert len(coded) == 14 and all(row.tokens == WINDOWS.numel() for row in coded)
    tower = [row for row in receipt.tensors if TOWERS[kind] in row.name]
    assert tower and all(row.format == "f32" for row in tower)
    parent = transformers.AutoModelForImageTextToText.from_pretrained(path)
    inside = sum(w.numel() for w in parent.get_decoder().parameters())
    outside = 1 - inside / sum(row.numel for row in receipt.tensors)
    note = next(note for note in receipt.notes if "no text goes through" in note)
    head = 0 if parent.config.tie_word_embeddings else parent.lm_head.weight.numel()
    share = outside - head / sum(row.numel for row in receipt.tensors)
    assert note.startswith(f"{share:.1%} of the model's numbers")

    model = fewbits.load(tmp_path / "int4")
    assert type(model) is type(parent)
    fewbits.convert(tmp_path / "int4", tmp_path / "decoded", file="huggingface")
    decoded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "decoded")
    for image in (False, True):
        expected = logits(decoded, image)
        assert alike(logits(model, image), expected)
        assert not alike(expected, logits(parent, image))


@pytest.mark.engine
@pytest.mark.parametrize("kind", SEEING)
def test_a_compressed_tensors_directory_has_the_same_logits(kind: str, tmp_path: Path) -> None:
    path = saved(kind, tmp_path / "float")
    fewbits.quantize(path, tmp_path / "ct", to="int4_g32", effort="fast", file="compressed-tensors")
    fewbits.convert(tmp_path / "ct", tmp_path / "decoded", file="huggingface")
    auto = transformers.AutoModelForImageTextToText
    packed, decoded = (auto.from_pretrained(tmp_path / name) for name in ("ct", "decoded"))
    for image in (False, True):
        assert alike(logits(packed, image), logits(decoded, image))


def test_a_rule_quantizes_the_tower_without_calibration_and_a_warning_says_so(tmp_path: Path) -> None:
    path = saved("llava", tmp_path / "float")
    plan = fewbits.Plan((parse_rule("*vision_tower.*_proj=int8_channel"),))
    with pytest.warns(CalibrationWarning, match="9 weights, such as .*vision_tower.* without calibration"):
        receipt = fewbits.quantize(
            path,
            tmp_path / "out",
            to="int4_g32",
            method="gptq",
            plan=plan,
            calibrate=Tokens.of(WINDOWS, "random"),
        )
    rows = {row.name: row for row in receipt.tensors if row.format == "int8_channel"}
    assert len(rows) == 9 and all(row.algorithm == "rtn" for row in rows.values())
    assert any("without calibration" in note for note in receipt.notes)
    decoded = load_model(open_checkpoint(tmp_path / "out"))
    assert alike(logits(fewbits.load(tmp_path / "out"), True), logits(decoded, True))


def test_a_model_that_sees_is_evaluated_on_text(tmp_path: Path) -> None:
    path = saved("llava", tmp_path / "float")
    fewbits.quantize(path, tmp_path / "out", to="int8_channel", effort="fast")
    checkpoint = open_checkpoint(path)
    assert head_of(checkpoint) == "causal"
    text = Text(WINDOWS.flatten(), "random")
    settings = Settings(context=24, score_from=4, prompts=1, prompt_tokens=8, new_tokens=4)
    found = fewbits.evaluate(path, [tmp_path / "out"], text, settings).quantized_models[0]
    assert found.fidelity is not None and 0 < found.fidelity.kl.value < 0.05


def test_roles_and_blocks_come_from_modules(tmp_path: Path) -> None:
    checkpoint = as_loaded(open_checkpoint(saved("llava", tmp_path)))
    found: dict[str, set[tuple[str, int | None]]] = {}
    for site in sites(checkpoint):
        part = next(part for part in ("vision", "projector", "language") if part in site.name)
        found.setdefault(part, set()).add((site.role, site.block))
    assert found["vision"] == found["projector"] == {("tower", None)}
    assert {block for _, block in found["language"]} == {None, 0, 1}
    assert {role for role, block in found["language"] if block is None} == {"embed", "output"}
