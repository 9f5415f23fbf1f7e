"""A small layout, its bytes, and what tests of the stream writer do with it."""

import os
import subprocess
import sys
from pathlib import Path

from fewbits.storage.stream import StreamFile

HEADER = b"HEADER--"
ENTRIES = [("a", 8, 5), ("b", 16, 40), ("none", 64, 0), ("c", 64, 7)]
BODIES = {"a": b"aaaaa", "b": bytes(range(40)), "none": b"", "c": b"ccccccc"}
WHOLE = HEADER + b"aaaaa" + bytes(3) + bytes(range(40)) + bytes(8) + b"ccccccc"


def start(path, fingerprint="run", **options):
    return StreamFile.open(path, HEADER, ENTRIES, fingerprint, **options)


def fill(file, names=BODIES):
    for name in names:
        if name not in file.done():
            file.write(name, BODIES[name], {"of": name})


def left_over(path):
    return sorted(file.name for file in path.parent.iterdir())


def python(script, *arguments):
    """Run a script in a fresh interpreter -> what it printed."""
    told = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert told.returncode == 0, told.stderr
    return told.stdout
