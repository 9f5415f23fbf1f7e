"""Tiny random models that read more than text, or that have an encoder, and inputs for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from small import SPECIAL, ids_of, random_model, shrunk

SIDE = 56  # pixels of an image, where the config leaves it open
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MULTIMODAL: dict[str, dict[str, Any]] = {
    **{
        name: {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}}
        for name in ("qwen2_vl", "qwen2_5_vl", "glm46v", "glm4v", "glm_ocr", "glmga")
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "llava": {"image_seq_length": 4, "vision_config": {"image_size": 28, "patch_size": 14}},
}
"""model type -> fields that the rules of `small.py` get wrong; a dictionary changes a part of the config"""
TOKENS = ("image_token_id", "image_token_index", "media_placeholder_token_id", "img_context_token_id")


def small_multimodal(model_type: str, cls: Any) -> Any:
    """A random model of a class, as `random_model` makes it."""
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[model_type]
    fields = merged(shrunk(known().to_dict()), SPECIAL.get(model_type, {}))
    config = known.from_dict(sectioned(merged(fields, MULTIMODAL.get(model_type, {}))))
    return random_model(cls, config)


def sectioned(fields: dict[str, Any]) -> dict[str, Any]:
    """With sections of rotary positions that fill the half of a head of 16, or of its rotated part."""
    changed = {name: sectioned(value) if isinstance(value, dict) else value for name, value in fields.items()}
    if changed.get("mrope_section"):
        half = int(8 * changed.get("partial_rotary_factor", 1))
        changed["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return changed


def merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    nested = {k: merged(fields.get(k) or {}, v) for k, v in changes.items() if isinstance(v, dict)}
    return {**fields, **changes, **nested}


def text_of(model: Any) -> dict[str, Any]:
    """Token ids for every stack of a model that reads them."""
    known = signature(model.forward).parameters
    given: dict[str, Any] = {"input_ids": ids_of()} if "input_ids" in known else {}
    if "decoder_input_ids" in known:
        given["decoder_input_ids"] = ids_of().flip(1)
    return given | ({"use_cache": False} if "use_cache" in known else {})


@torch.no_grad()
def image_of(model: Any) -> dict[str, Any] | None:
    """Random pixels or sound with token ids, as the model takes them; None where no guess is right: right is
    what runs, and changes the logits with the pixels."""
    text = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in text_of(model).items()}
    for guess in _guesses(model, set(signature(model.forward).parameters)):
        for ids in _with_places(model, guess, text.get("input_ids")):
            given = text | guess | ids
            try:
                torch.manual_seed(0)
                first = model(**given).logits
                changed = {k: v.flip(0, -1) + 1 if v.is_floating_point() else v for k, v in guess.items()}
                if not torch.equal(first, model(**given | changed).logits):
                    return given
            except Exception:  # noqa: BLE001 - whatever a wrong guess raises
                continue
    return None


def _guesses(model: Any, known: set[str]) -> Iterator[dict[str, torch.Tensor]]:
    parts = [model.config, *(p for p in vars(model.config).values() if hasattr(p, "to_dict"))]
    parts = [*parts, *(p for part in parts[1:] for p in vars(part).values() if hasattr(p, "to_dict"))]

    def field(*names: str, default: int) -> int:
        found = (getattr(part, name, None) for name in names for part in reversed(parts))
        value = next((value for value in found if value is not None), default)
        return int(value[0] if isinstance(value, list | tuple) else value)

    side, patch = field("image_size", default=SIDE), field("patch_size", default=14)
    channels = field("num_channels", "in_channels", "in_chans", default=3)
    tiles, bins = field("max_num_tiles", default=1), field("num_mel_bins", "feature_size", default=80)
    flat = channels * field("temporal_patch_size", default=1) * patch * patch
    grid, whole = torch.tensor([[1, 4, 4]]), torch.tensor([[side, side]])
    pixels, tile = "image_pixel_values" if "image_pixel_values" in known else "pixel_values", torch.ones
    shapes: tuple[tuple[str, tuple[int, ...], dict[str, torch.Tensor]], ...] = (
        (pixels, (1, channels, side, side), {"image_sizes": whole}),
        (pixels, (16, flat), {"image_grid_thw": grid, "image_merge_sizes": torch.tensor([2])}),
        (pixels, (1, 1, channels, side, side), {"image_sizes": whole}),
        (pixels, (1, 5, channels, side, side), {"image_sizes": whole}),
        (pixels, (1, 3, channels, side, side), {"image_sizes": whole}),
        (pixels, (1, 16, flat), {"spatial_shapes": grid[:, 1:], "pixel_attention_mask": tile(1, 16).long()}),
        (pixels, (1, channels, patch, 16 * patch), {"target_sizes": grid[:, 1:]}),
        (pixels, (1, 1, tiles, channels, side, side), {
            "aspect_ratio_ids": tile(1, 1).long(), "aspect_ratio_mask": tile(1, 1, tiles).long(),
            "cross_attention_mask": tile(1, 24, 1, tiles).long(),
        }),
        ("image_patches", (1, 16, flat), {}),
        ("flattened_patches", (1, 16, 2 + flat), {}),
        ("input_features", (1, bins, 2 * field("max_source_positions", default=64)), {}),
        ("input_features", (1, 64, bins), {}),
        ("input_values", (1, 16000), {}),
    )  # fmt: skip
    for name, shape, more in shapes:
        if name in known:
            values = torch.randn(shape, generator=torch.Generator().manual_seed(2))
            if name == "flattened_patches":
                values[..., :2] = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5))
            yield {name: values} | {key: value for key, value in more.items() if key in known}


def _with_places(model: Any, guess: dict[str, Any], ids: torch.Tensor | None) -> Iterator[dict[str, Any]]:
    """Token ids with a place for each feature of the image, and without."""
    token = next((t for n in TOKENS if (t := getattr(model.config, n, None)) is not None), None)
    owner = next(
        (m for m in (model, getattr(model, "model", None)) if hasattr(m, "get_image_features")), None
    )
    if ids is not None and token is not None and owner is not None:
        known = signature(owner.get_image_features).parameters
        try:
            found = owner.get_image_features(**{k: v for k, v in guess.items() if k in known})
        except Exception:  # noqa: BLE001 - whatever a wrong guess raises
            return
        found = getattr(found, "pooler_output", found)
        found = found if isinstance(found, list | tuple) else [found]
        count = sum(part.numel() // part.shape[-1] for part in found if isinstance(part, torch.Tensor))
        places = torch.full((1, count), token)
        ids = torch.cat([ids[:, :2], places, ids[:, 2:]], 1)
        known = signature(model.forward).parameters
        given: dict[str, Any] = {"input_ids": ids}
        if "mm_token_type_ids" in known:
            given["mm_token_type_ids"] = (ids == token).long()
        yield given
    yield {}
