"""Sources of calibration text: files and data sets, read only as far as needed.

    text file    ->  its characters, from the start
    JSON lines   ->  one object a line: {"text": "..."}
                     or a conversation: {"messages": [{"role": "user", "content": "..."}, ...]}
                     or in ShareGPT's form: {"conversations": [{"from": "human", "value": "..."}, ...]}
    hf:NAME...   ->  rows of the same kind, streamed by the `datasets` package

A document is a string or a conversation, a list of messages with role and content.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CalibrationError, FileError, raise_all
from ..storage.json import regular_size

Document = str | list[dict[str, Any]]

CHUNK = 2**20  # bytes read at once
LONGEST_LINE = 64 * 2**20  # bytes
FAULTS = 20  # bad lines listed before reading stops
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its roles -> the chat templates'
SPLITS = ("train", "validation", "valid", "dev", "test")


def read_characters(path: Path) -> Iterator[str]:
    """A UTF-8 file -> its text, piece by piece; CalibrationError names the first byte that is not UTF-8."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(path) as file:
        while True:
            raw = file.read(CHUNK)
            waiting = len(decoder.getstate()[0])  # the first bytes of a character at the chunk's end
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset - waiting + error.start) from error
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(raw)
            if not raw:
                return


def read_json_lines(path: Path) -> Iterator[Document]:
    """A file with one JSON object a line -> its documents. CalibrationError lists the faulty lines."""
    faults: list[str] = []
    offset = 0
    with _open(path) as file:
        for number, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            try:
                document = _document(_parse(raw))
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start) from error
            except (ValueError, RecursionError) as error:
                faults.append(f"line {number}: {error}")
                if len(faults) == FAULTS:
                    break
                continue
            finally:
                offset += len(raw)
            if document and not faults:
                yield document
    raise_all(CalibrationError, f"{path}: one JSON object a line is needed", faults)


def read_dataset(spec: str) -> Iterator[Document]:
    """`hf:NAME[:CONFIG][:SPLIT]` -> its documents, streamed; the default split is train.

    Of two words the second is a split if it begins as one (train, validation, test ...): `hf:NAME::SPLIT`
    names any other. Raises CalibrationError if `datasets` fails.
    """
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{spec}: the datasets package is not installed; `pip install datasets`, or give a text file"
        ) from error
    name, config, split = parse_dataset(spec)
    try:
        for number, row in enumerate(datasets.load_dataset(name, config, split=split, streaming=True)):
            try:
                document = _document(row)
            except ValueError as error:
                raise CalibrationError(f"{spec}: row {number}: {error}") from error
            if document:
                yield document
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CalibrationError(f"{spec}: datasets cannot read it: {error}") from error


def parse_dataset(spec: str) -> tuple[str, str | None, str]:
    """`hf:NAME[:CONFIG][:SPLIT]` -> name, config or None, split."""
    name, *rest = spec.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise CalibrationError(f"{spec!r} is not of the form hf:NAME[:CONFIG][:SPLIT]")
    if len(rest) == 1 and rest[0].startswith(SPLITS):
        rest.insert(0, "")
    config, split = [*rest, "", ""][:2]
    return name, config or None, split or "train"


def _open(path: Path) -> BinaryIO:
    regular_size(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


def _not_utf8(path: Path, offset: int) -> CalibrationError:
    return CalibrationError(
        f"{path}: byte {offset} is not UTF-8; convert the file, as by `iconv -f latin1 -t utf-8`"
    )


def _parse(raw: bytes) -> Any:
    """One line -> its object, None for an empty one; ValueError or RecursionError."""
    if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
        raise ValueError(f"longer than {LONGEST_LINE} bytes")
    text = raw.decode("utf-8").removeprefix("\ufeff").strip()
    try:
        return json.loads(text) if text else {"text": ""}
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from error


def _document(row: Any) -> Document:
    """A row -> its text or its messages; ValueError if it has neither."""
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__}, an object is needed")
    if isinstance(row.get("text"), str):
        return row["text"]
    messages = row.get("messages", row.get("conversations"))
    if not isinstance(messages, list):
        raise ValueError(
            f'no string "text", no list "messages" or "conversations"; it has {", ".join(map(repr, row))}'
        )
    return [_message(message) for message in messages]


def _message(message: Any) -> dict[str, Any]:
    if isinstance(message, dict) and isinstance(message.get("from"), str) and "value" in message:
        role = SHAREGPT.get(message["from"], message["from"])
        message = {"role": role, "content": message["value"]}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError("a message has no role and content")
    return message
