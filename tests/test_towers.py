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
from fewbits.runtime.packed import packed_modules
from fewbits.runtime.runner import Blockwise
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
    "idefics3": {"text_config": TEXT, "image_token_id": 319, "scale_factor": 2,
                 "vision_config": VISION | {"model_type": "idefics3_vision"}},
}  # fmt: skip
TOWERS = dict.fromkeys(SEEING, "vision_tower") | {"idefics3": "vision_model"}
WINDOWS = torch.randint(3, 300, (8, 24), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def saved(kind: str, folder: Path) -> Path:
    save_random("AutoModelForImageTextToText", kind, SEEING[kind], folder)
    return folder


@torch.no_grad()
def logits(model: Any, image: bool) -> torch.Tensor:
    if not image:
        return model(input_ids=WINDOWS[:2]).logits
    kind = model.config.model_type
    places = 1 if kind in ("internvl", "idefics3") else 4
    ids = torch.cat([WINDOWS[:1, :3], torch.full((1, places), 319), WINDOWS[:1, 3:]], 1)
    more = {"token_type_ids": (ids == 319).long()} if kind == "gemma3" else {}
    pixels = PIXELS[None] if kind == "idefics3" else PIXELS  # of several images in a text
    return model(input_ids=ids, pixel_values=pixels, **more).logits


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


@pytest.mark.parametrize("kind", SEEING)
def test_quantize_model_leaves_the_tower_in_float_too(kind: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(saved(kind, tmp_path))
    packed = [name for name, _, _ in packed_modules(fewbits.quantize_model(model, "int4_g32"))]
    assert len(packed) == 14 and not any(TOWERS[kind] in name for name in packed)


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


def test_blocks_for_images_alone_are_rounded_and_a_warning_says_so(tmp_path: Path) -> None:
    """Llama 3.2: text does not go through the layers of cross attention."""
    text = TEXT | {"model_type": "mllama_text_model", "num_hidden_layers": 3, "cross_attention_layers": [1],
                   "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
                   "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_global_layers": 1,
              "attention_heads": 4, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0],
              "vision_output_dim": 128}  # fmt: skip
    fields = {"text_config": text, "vision_config": vision, "image_token_index": 319}
    save_random("AutoModelForImageTextToText", "mllama", fields, tmp_path / "float")
    with pytest.warns(CalibrationWarning, match=r"7 weights, such as .*layers\.1\..* without calibration"):
        receipt = fewbits.quantize(
            tmp_path / "float", tmp_path / "o", to="int4_g32", method="gptq", calibrate=Tokens.of(WINDOWS, "")
        )
    read = {row.name: row.tokens for row in receipt.tensors if row.format == "int4_g32"}
    assert len(read) == 21 and all((tokens is None) == (".1." in name) for name, tokens in read.items())
    fewbits.convert(tmp_path / "o", tmp_path / "decoded", file="huggingface")
    decoded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "decoded")
    assert alike(logits(fewbits.load(tmp_path / "o"), False), logits(decoded, False))
    found = torch.stack(list(Blockwise(open_checkpoint(tmp_path / "o")).logits(WINDOWS[:2])))
    assert alike(found, logits(decoded, False))
