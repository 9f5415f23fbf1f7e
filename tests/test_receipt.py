"""Receipts: JSON and back is exact, totals are derived from the rows, tables line up."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits.errors import FileError
from fewbits.release.receipt import FileDigest, Receipt, TensorRow
from fewbits.table import size, table

text = st.text(st.characters(codec="utf-8"), max_size=8)
number = st.floats(allow_nan=False, allow_infinity=False, min_value=0)
rows = st.builds(
    TensorRow,
    name=text,
    shape=st.lists(st.integers(1, 99), min_size=1, max_size=3).map(tuple),
    source_dtype=text,
    asked=text,
    format=text,
    nbytes=st.integers(0, 2**40),
    digest=text,
    algorithm=st.none() | text,
    options=st.dictionaries(text, st.booleans() | st.integers() | number | text, max_size=2),
    reason=st.none() | text,
    gguf_name=st.none() | text,
    relative_error=st.none() | number,
    sqnr_db=st.none() | number,
    max_abs_error=st.none() | number,
)
files = st.builds(FileDigest, text, st.integers(0, 2**40), text)
receipts = st.builds(
    Receipt,
    source=text,
    target=text,
    tensors=st.lists(rows, max_size=4).map(tuple),
    plan=text,
    plan_digest=text,
    inputs=st.lists(files, max_size=2).map(tuple),
    outputs=st.lists(files, max_size=2).map(tuple),
    seconds=number,
    peak_memory_bytes=st.integers(0, 2**40),
    versions=st.dictionaries(text, text, max_size=2),
    recipe=st.none() | text,
)


def row(name, format_="q4_k", asked="q4_k", shape=(4, 256), nbytes=576, **more):
    return TensorRow(name, shape, "bf16", asked, format_, nbytes, "00", **more)


def receipt(*tensors):
    return Receipt("in", "out", tensors, "", "", (), (), 1.5, 2**20, {"python": "3.11"})


@given(receipts)
def test_json_round_trips(made):
    again = Receipt.from_json(made.to_json())
    assert again == made
    assert again.to_json() == made.to_json()


@given(receipts)
def test_totals_are_those_of_the_rows(made):
    totals = json.loads(made.to_json())["totals"]
    assert totals["nbytes"] == made.nbytes == sum(r.nbytes for r in made.tensors)
    assert totals["bits_per_weight"] * max(made.numel, 1) == pytest.approx(8 * made.nbytes)
    assert totals["changed"] == sum(r.asked != r.format for r in made.tensors)


def test_bits_per_weight_by_hand():
    made = receipt(row("a"), row("b", "f16", "f16", (1024,), 2048))
    assert made.bits_per_weight == 8 * (576 + 2048) / 2048


def test_table_tells_formats_errors_and_reasons():
    made = receipt(
        row("good", relative_error=0.01, sqnr_db=40.0, max_abs_error=0.5),
        row("bad", "q5_0", reason="row length 576 is not a multiple of 256", relative_error=0.09),
        row("norm", "f32", "f32", (256,), 1024),
    )
    shown = made.table(worst=1)
    assert "row length 576 is not a multiple of 256" in shown
    assert "bad" in shown and "good" not in shown
    assert f"{made.bits_per_weight:.3f} bits per weight" in shown
    formats = [line.split()[0] for line in shown.split("\n\n")[0].splitlines()[2:]]
    assert sorted(formats) == ["f32", "q4_k", "q5_0"]


def test_every_fault_of_a_receipt_is_named():
    body = json.loads(receipt(row("a")).to_json())
    del body["plan"], body["seconds"]
    body["colour"] = "red"
    with pytest.raises(FileError) as caught:
        Receipt.from_json(json.dumps(body), "r.json")
    for part in ("r.json", "'plan' is missing", "'seconds' is missing", "'colour' is unknown"):
        assert part in str(caught.value)


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"receipt": 99}', '{"receipt": 1}'])
def test_what_is_no_receipt_is_refused(body):
    with pytest.raises(FileError, match=r"r\.json"):
        Receipt.from_json(body, "r.json")


def test_a_bad_row_is_named():
    body = json.loads(receipt(row("a"), row("b")).to_json())
    del body["tensors"][1]["digest"]
    with pytest.raises(FileError, match=r"tensors\[1\].*'digest' is missing"):
        Receipt.from_json(json.dumps(body))


def test_a_receipt_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        receipt().seconds = 0


cells = st.none() | st.integers() | st.floats() | st.text("abc. ", min_size=1).filter(str.strip)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1)))
def test_columns_line_up(lines):
    head = [f"column{i}" for i in range(len(lines[0]))]
    shown = table(head, lines).splitlines()
    assert len(shown) == len(lines) + 2
    rule = shown[1]
    gaps = [i for i, mark in enumerate(rule) if mark == " "]
    assert all(line[i : i + 1].strip() == "" for line in [shown[0], *shown[2:]] for i in gaps)
    assert max(map(len, shown)) <= len(rule)


def test_numbers_stand_to_the_right_and_words_to_the_left():
    shown = table(
        ["name", "bits", "size"], [["a", 4.5, "1.5 KiB"], ["long", 16, "912 B"], ["x", None, "3 B"]]
    )
    assert shown.splitlines() == [
        "name   bits     size",
        "----  -----  -------",
        "a     4.500  1.5 KiB",
        "long     16    912 B",
        "x         -      3 B",
    ]


def test_an_empty_table_is_its_head():
    assert table(["a", "b"], []).splitlines() == ["a  b", "-  -"]


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (2**31, "2.00 GiB")],
)
def test_sizes(nbytes, shown):
    assert size(nbytes) == shown
