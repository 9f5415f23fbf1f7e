"""Damaged and hostile files through the command line: exit code 1, one readable message, nothing left."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from gguf import GGUFValueType

from fewbits.cli.main import main
from fewbits.files.gguf.file import GGUFValue, gguf_header, read_gguf
from tests.attacks.forge import (
    ARRAY,
    F32,
    Q8_0,
    STRING,
    UINT32,
    gguf,
    key,
    row,
    safetensors,
    string,
    tensor,
    u32,
    u64,
)
from tests.tiny import save_tiny

ARCH = key("general.architecture", STRING, string("llama"))
HUGE = 2**64 - 1
TERMINAL = "\x1b]0;owned\x07\x1b[31m"

GGUF = {
    "empty": b"",
    "not GGUF": b"PK\x03\x04" + bytes(60),
    "header only": b"GGUF" + u32(3),
    "keys without end": gguf([ARCH], [], key_count=HUGE),
    "tensors without end": gguf([ARCH], [], tensor_count=HUGE),
    "absurd string": gguf([key("k", STRING, string("v", HUGE))], []),
    "absurd array": gguf([key("k", ARRAY, u32(UINT32) + u64(HUGE))], []),
    "nested arrays": gguf([key("k", ARRAY, (u32(ARRAY) + u64(1)) * 5000)], []),
    "tensor past the end": gguf([ARCH], [tensor("a", [32, 4], Q8_0, 0)], bytes(10)),
    "overlap": gguf([ARCH], [tensor("a", [8], F32, 0), tensor("b", [8], F32, 0)], bytes(32)),
    "product overflows": gguf([ARCH], [tensor("a", [2**63, 2, 2, 1], F32, 0)], bytes(32)),
    "unknown type": gguf([ARCH], [tensor("a", [32], 99, 0)], bytes(128)),
    "keys of llama missing": gguf([ARCH], [tensor("a", [32], F32, 0)], bytes(128)),
    "control characters": gguf([ARCH], [tensor(TERMINAL, [32], 99, 0)], bytes(128)),
}
WEIGHTS = {
    "empty": b"",
    "truncated header": safetensors({"a": row("F32", [2], 0, 8)}, bytes(8))[:20],
    "truncated data": safetensors({"a": row("F32", [2], 0, 8)}, bytes(7)),
    "absurd header": struct.pack("<Q", HUGE) + b"{}",
    "absurd shape": safetensors({"a": row("F32", [2**62, 2**62], 0, 8)}, bytes(8)),
    "overlap": safetensors({"a": row("F32", [2], 0, 8), "b": row("F32", [2], 4, 12)}, bytes(12)),
    "unknown dtype": safetensors({"a": row("F99", [2], 0, 8)}, bytes(8)),
    "offsets not numbers": safetensors({"a": row("F32", [2], "0", None)}, bytes(8)),
    "JSON nested": safetensors(b'{"a":' * 100_000, b""),
    "control characters": safetensors({TERMINAL: row("F99", [2], 0, 8)}, bytes(8)),
    "pickle": b"\x80\x04cposix\nsystem\n(S'true'\ntR.",
    "too few tensors": safetensors({"model.norm.weight": row("F32", [2], 0, 8)}, bytes(8)),
}
CONFIGS = {
    "empty": b"",
    "list": b"[]",
    "nested": b"[" * 200_000,
    "not UTF-8": b'{"a": "\xff"}',
    "absurd number": b'{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1e999}',
    "wrong types": b'{"architectures": 3, "num_hidden_layers": "many"}',
    "names no architecture": b"{}",
    "layers negative": b'{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": -1, '
    b'"num_attention_heads": 0}',
    "layers a list": b'{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": [2]}',
}
TOKENIZERS = {
    "empty": b"",
    "list": b"[]",
    "no model": b"{}",
    "vocabulary a list": b'{"model": {"type": "BPE", "vocab": [1, 2], "merges": []}}',
    "merges of numbers": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [1]}}',
    "ids absurd": b'{"model": {"type": "BPE", "vocab": {"a": 99999999999}, "merges": []}}',
    "ids not numbers": b'{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}',
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("models") / "tiny", **shape)


@pytest.fixture(scope="module")
def native(model, tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("natives") / "native"
    assert (
        main(["quantize", str(model), "--to", "int4_g32", "--effort", "fast", "--out", str(at), "--json"])
        == 0
    )
    return at


def refused(capsys, hostile: Path, *arguments: object) -> str:
    """Run a command in `hostile`'s directory: it must fail cleanly and leave all as it was -> its message."""
    before = {p: p.read_bytes() for p in hostile.parent.rglob("*") if p.is_file()}
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert err.startswith(f"fewbits {arguments[0]}: error: ")
    assert "Traceback" not in err and "\x1b" not in err and len(err) < 10_000
    assert {p: p.read_bytes() for p in hostile.parent.rglob("*") if p.is_file()} == before
    return err


@pytest.mark.parametrize("case", GGUF)
@pytest.mark.parametrize("command", ["quantize", "convert", "evaluate"])
def test_gguf(tmp_path, capsys, model, case, command):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(GGUF[case])
    options = {
        "quantize": ["quantize", path, "--to", "q4_0", "--out", tmp_path / "out.gguf"],
        "convert": ["convert", path, tmp_path / "out"],
        "evaluate": ["evaluate", model, path, "--sample", 64, "--context", 32],
    }
    assert "hostile.gguf" in refused(capsys, path, *options[command])


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("to", ["q4_0", "int4_g32"])
def test_safetensors(tmp_path, capsys, model, case, to):
    source = shutil.copytree(model, tmp_path / "hostile")
    (source / "model.safetensors").write_bytes(WEIGHTS[case])
    message = refused(capsys, source, "quantize", source, "--to", to, "--out", tmp_path / "out")
    assert "hostile" in message or "is missing; fetch the checkpoint again" in message


@pytest.mark.parametrize("case", CONFIGS)
def test_config(tmp_path, capsys, model, case):
    source = shutil.copytree(model, tmp_path / "hostile")
    (source / "config.json").write_bytes(CONFIGS[case])
    refused(
        capsys, source, "quantize", source, "--to", "q4_0", "--out", tmp_path / "out.gguf", "--file", "gguf"
    )


COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size")
WRONG = [(field, value) for field in COUNTS for value in (-1, 0.5, "many", [2], {}, 2**40, 1e999, True)]
WRONG += [("rms_norm_eps", value) for value in ("many", [2], {}, 1e999, True)]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_hyperparameters(tmp_path, capsys, model, field, value):
    source = shutil.copytree(model, tmp_path / "hostile")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {field: value}))
    for out in ("out.gguf", "out"):
        message = refused(capsys, source, "quantize", source, "--to", "q4_0", "--file",
                          "gguf" if out == "out.gguf" else "native", "--out", tmp_path / out)  # fmt: skip
        assert f"{field} is " in message


U, S, A = GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.ARRAY
LYING_KEYS = {
    "llama.block_count": [GGUFValue(U, 2**32 - 1), GGUFValue(S, "two"), GGUFValue(U, 0)],
    "llama.attention.head_count": [GGUFValue(U, 0), GGUFValue(S, "x"), GGUFValue(A, [4], U)],
    "llama.embedding_length": [GGUFValue(U, 0), GGUFValue(S, "")],
    "tokenizer.ggml.tokens": [GGUFValue(U, 5), GGUFValue(A, [1, 2], U)],
    "tokenizer.ggml.merges": [
        GGUFValue(U, 5),
        GGUFValue(S, "a b"),
        GGUFValue(A, [1], U),
        GGUFValue(A, ["ab"], S),
    ],
    "tokenizer.ggml.token_type": [GGUFValue(S, ""), GGUFValue(A, ["1"], S), GGUFValue(A, [1], U)],
    "tokenizer.ggml.bos_token_id": [GGUFValue(S, "0"), GGUFValue(A, [1], U)],
    "tokenizer.ggml.pre": [GGUFValue(U, 5), GGUFValue(S, "none such")],
    "tokenizer.ggml.model": [GGUFValue(U, 5), GGUFValue(S, "none such")],
    "tokenizer.chat_template": [GGUFValue(U, 5)],
}


@pytest.mark.parametrize(("name", "lie"), [(name, lie) for name, lies in LYING_KEYS.items() for lie in lies])
def test_a_key_that_lies(tmp_path, capsys, model, name, lie):
    """A sound GGUF file but for one key."""
    sound = tmp_path / "sound.gguf"
    assert main(["convert", str(model), str(sound)]) == 0
    file = read_gguf(sound)
    infos = [(t.name, t.shape, t.type_name) for t in file.tensors.values()]
    size = len(gguf_header(file.values, infos)[0])
    hostile = tmp_path / "hostile.gguf"
    hostile.write_bytes(gguf_header(file.values | {name: lie}, infos)[0] + sound.read_bytes()[size:])
    message = refused(capsys, hostile, "convert", hostile, tmp_path / "out")
    field = {
        "block_count": "num_hidden_layers",
        "head_count": "num_attention_heads",
        "embedding_length": "hidden_size",
    }
    last = name.rsplit(".", 1)[-1]
    assert field.get(last, last) in message


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer(tmp_path, capsys, model, case):
    source = shutil.copytree(model, tmp_path / "hostile")
    (source / "tokenizer.json").write_bytes(TOKENIZERS[case])
    message = refused(capsys, source, "quantize", source, "--to", "q4_0", "--out", tmp_path / "out.gguf")
    assert "tokenizer.json" in message


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["gguf", "native", "huggingface"])
def test_truncated(tmp_path, capsys, model, native, kind, share):
    hostile = tmp_path / "hostile"
    if kind == "gguf":
        assert (
            main(
                [
                    "quantize",
                    str(model),
                    "--to",
                    "q8_0",
                    "--effort",
                    "fast",
                    "--out",
                    str(hostile),
                    "--file",
                    "gguf",
                ]
            )
            == 0
        )
        (tmp_path / "hostile.receipt.json").unlink()
        file = hostile
    else:
        file = shutil.copytree(native if kind == "native" else model, hostile) / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * share))
    assert file.name in refused(capsys, hostile, "inspect", hostile)
    message = refused(capsys, hostile, "convert", hostile, tmp_path / "out")
    assert "truncated" in message or "claims" in message or "ends at byte" in message


def test_a_native_index_that_lies(tmp_path, capsys, native):
    source = shutil.copytree(native, tmp_path / "hostile")
    index = json.loads((source / "fewbits.json").read_text())
    for number, tensor_ in enumerate(index["tensors"].values()):
        tensor_["format"] = ["int8_g32", "q4_0", "none", "nf4"][number % 4]
    (source / "fewbits.json").write_text(json.dumps(index))
    message = refused(capsys, source, "convert", source, tmp_path / "out")
    assert "unknown format 'none'" in message and "is missing" in message


def test_links_and_pipes(tmp_path, capsys):
    os.mkfifo(tmp_path / "hostile.gguf")
    assert "not a regular file" in refused(
        capsys, tmp_path / "hostile.gguf", "inspect", tmp_path / "hostile.gguf"
    )
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop" in refused(capsys, tmp_path / "loop", "inspect", tmp_path / "loop")


def test_a_side_file_that_is_a_link_elsewhere_is_copied_as_text_only(tmp_path, capsys, model):
    """What `quantize` writes beside the weights are regular files with the content of the source's."""
    source = shutil.copytree(model, tmp_path / "source")
    (source / "tokenizer_config.json").unlink()
    (source / "tokenizer_config.json").symlink_to(model / "tokenizer_config.json")
    assert (
        main(["quantize", str(source), "--to", "nf4", "--effort", "fast", "--out", str(tmp_path / "out")])
        == 0
    )
    copy = tmp_path / "out" / "tokenizer_config.json"
    assert not copy.is_symlink() and copy.read_bytes() == (model / "tokenizer_config.json").read_bytes()
