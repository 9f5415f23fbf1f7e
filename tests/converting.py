"""Tiny models of many architectures for llama.cpp's converter, with tokenizers that it takes.

with converting():                                       one process imports what it needs, and parts
    model = gguf_model("olmo2")
    model.save_pretrained(source)
    convert_in_floats("olmo2", source, out)
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fewbits
from bench.small import SPECIAL, shrunk, small_model
from fewbits.adapters.llamacpp_convert import SCRIPT, interpreter
from fewbits.errors import ModelError
from tests.tiny import bpe_tokenizer, spm_tokenizer

PYTHON = interpreter()  # before a test's own cache

SIZE = 300
LETTERS = "▁etaoinshrdlu"
CLASSES = {"llama": "LlamaTokenizerFast"}
KINDS = {"gemma3": ("spm",), "deepseek_v32": ("llama",)}
GLM = (
    "<|startoftext|>",
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)

_SERVE = """
import json, os, runpy, socketserver, sys, tempfile, traceback
from pathlib import Path

folder, script, address = sys.argv[1:]
sys.path[:1] = [folder, str(Path(folder) / "gguf-py")]
import torch, transformers, conversion, gguf
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from conversion.base import ModelBase, TextModel
torch.set_num_threads(1)

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        given = json.loads(self.rfile.readline())
        with tempfile.TemporaryFile() as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            try:
                runpy.run_path(script)["main"](*given)
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stderr.flush()
            log.seek(0)
            said = log.read().decode(errors="replace")
        self.wfile.write(json.dumps([code, said]).encode())

class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    pass

server = Server(address + ".new", Handler)
os.rename(address + ".new", address)  # there once it listens
server.serve_forever()
"""
_PIECES = """
import json, sys
from sentencepiece import sentencepiece_model_pb2 as pb
model = pb.ModelProto()
model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
for i, text in enumerate(json.load(sys.stdin)):
    piece = model.pieces.add()
    piece.piece, piece.score = text, -float(i)
    piece.type = 2 if i == 0 else 3 if i < 3 else 6 if text.startswith("<0x") else 1
open(sys.argv[1], "wb").write(model.SerializeToString())
"""

_HYBRID = ["linear_attention", "full_attention"] * 2
_WINDOWS = ["sliding_attention", "full_attention"] * 2
_THETA = {"rope_type": "default", "rope_theta": 500000.0}
_ROPE = {"full_attention": _THETA, "sliding_attention": _THETA}
_HALF = {name: _THETA | {"partial_rotary_factor": 0.5} for name in _ROPE}
_INDEXED = {"index_head_dim": 128, "index_topk": 64}
CARE: dict[str, dict[str, Any]] = {
    "afmoe": {"mup_enabled": True},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bitnet": {"tie_word_embeddings": True},
    "deepseek_v32": _INDEXED,
    "dots1": {"num_key_value_heads": 4},
    "ernie4_5_moe": {"moe_intermediate_size": 64},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "falcon": {"ffn_hidden_size": 256},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"text_config": {"query_pre_attn_scalar": 16}},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "gemma3n_text": {"laurel_rank": 64, "activation_sparsity_pattern": [0.95] * 4},
    "glm_moe_dsa": _INDEXED,
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {
        "layer_types": ["full_attention", *["sliding_attention"] * 3],
        "num_attention_heads_per_layer": [4] * 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"text_config": {"attention_chunk_size": 8192}},
    "llama4_text": {"attention_chunk_size": 8192},
    "mellum": {"layer_types": _WINDOWS, "rope_parameters": _ROPE},
    "mimo_v2_flash": {"rope_parameters": _HALF},
    "mistral": {"sliding_window": None},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "olmoe": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4, "intermediate_size": 256},
    "qwen3_5": {"text_config": {"head_dim": 64}},
    "qwen3_5_moe": {"text_config": {"head_dim": 64}},
    "qwen3_5_moe_text": {"head_dim": 64},
    "qwen3_5_text": {"head_dim": 64},
    "qwen3_moe": {"norm_topk_prob": True},
    "sarvam_mla": {"q_lora_rank": 32},
}
"""model type -> fields that every published model of it has, and the engine presumes"""
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gguf_model(model_type: str) -> Any:
    """`small_model` as the engine knows its architecture."""
    from transformers import CONFIG_MAPPING

    fields = SPECIAL.get(model_type, {}) | TOKENS | CARE.get(model_type, {})
    if "text_config" in fields:
        text = shrunk(CONFIG_MAPPING[model_type]().to_dict())["text_config"]
        fields["text_config"] = text | fields["text_config"]
    with patch.dict(SPECIAL, {model_type: fields}):
        return small_model(model_type)


@contextmanager
def converting() -> Iterator[None]:
    """Within, fewbits runs the converter in a child of one process, and finds it where it is now, whatever
    cache a test has."""
    with patch.dict(os.environ, {"FEWBITS_CONVERTER": str(PYTHON)}), tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "socket")
        python = str(interpreter())
        place = str(interpreter().parent.parent / "llama.cpp")
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
        variables.pop("PYTHONPATH", None)
        command = [python, "-W", "ignore", "-c", _SERVE, place, str(SCRIPT), address]
        process = subprocess.Popen(command, env=variables, cwd=folder)

        def ran(command: Sequence[str], folder: Path) -> tuple[int, str]:
            while not Path(address).exists() and process.poll() is None:
                time.sleep(0.05)
            with socket.socket(socket.AF_UNIX) as link:
                link.connect(address)
                link.sendall(json.dumps(command[2:]).encode() + b"\n")
                answer = b"".join(iter(lambda: link.recv(2**16), b""))
            return tuple(json.loads(answer)) if answer else (1, "killed")  # type: ignore[return-value]

        try:
            with patch("fewbits.adapters.llamacpp_convert.ran", ran):
                yield
        finally:
            process.kill()
            process.wait()


def write_pieces(spec: dict[str, Any], path: Path) -> None:
    """tokenizer.model with the vocabulary of a tokenizer.json of the SentencePiece kind."""
    pieces = json.dumps(list(spec["model"]["vocab"])).encode()
    subprocess.run([interpreter(), "-c", _PIECES, path], input=pieces, check=True)


def _cut(spec: dict[str, Any]) -> dict[str, Any]:
    """Special tokens, bytes, a few letters and what merges make of them."""
    model = spec["model"]
    kept = [text for text, i in model["vocab"].items() if i < 259 or text in LETTERS]
    for pair in sorted(model["merges"], key=lambda pair: len("".join(pair))):
        if set(pair) <= set(kept) and "".join(pair) not in kept and len(kept) < SIZE:
            kept.append("".join(pair))
    merges = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= set(kept)]
    return spec | {"model": model | {"vocab": {text: i for i, text in enumerate(kept)}, "merges": merges}}


def save_tokenizer(kind: str, path: Path) -> None:
    """A tokenizer of about SIZE tokens in the directory `path`: "bpe", with the tokens that GLM's converter
    asks for; "llama", the same of LlamaTokenizer; "spm" (SentencePiece, with tokenizer.model)."""
    spec = _cut(spm_tokenizer()) if kind == "spm" else bpe_tokenizer(size=SIZE)
    if kind != "spm":
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        size = len(spec["model"]["vocab"])
        more = [{"id": size + i, "content": text, "special": True} | flags for i, text in enumerate(GLM)]
        spec["added_tokens"] += more
        spec["post_processor"] = spm_tokenizer()["post_processor"]
    else:
        write_pieces(spec, path / "tokenizer.model")
    (path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = names | {
        "add_bos_token": True,
        "tokenizer_class": CLASSES.get(kind, "PreTrainedTokenizerFast"),
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def convert_in_floats(model_type: str, source: Path, out: Path) -> None:
    """A saved model -> its float GGUF, with the first tokenizer that the converter takes."""
    *others, last = KINDS.get(model_type, ("bpe", "spm"))
    for kind in others:
        save_tokenizer(kind, source)
        try:
            fewbits.convert(source, out)
            return
        except ModelError as error:
            if "okenizer" not in str(error):
                raise
    save_tokenizer(last, source)
    fewbits.convert(source, out)
