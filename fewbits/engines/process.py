"""An engine's script on a file, in a process of its own, within limits of time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..devices import Room
from ..errors import KernelError
from ..files.checkpoint import Checkpoint
from . import SCRIPTS, Engine

WORK = 2**30  # bytes beside the weights on a device: the activations of a few windows


class Process:
    """seconds: until the first window is there, and from each to the next. memory: bytes that the process may
    take (default: four times the model in f32, and 4 GiB). stored: the type that weights stay in, if its
    engine computes `by_layer`. room: the devices to choose from (default: the CPU), if the engine takes one
    and weights do not stay as stored. said: the script's last line, once it has ended.

    KernelError where the engine is not installed.
    """

    def __init__(
        self,
        engine: Engine,
        checkpoint: Checkpoint,
        seconds: float = 600,
        memory: int | None = None,
        stored: str | None = None,
        room: Room | None = None,
    ) -> None:
        method = getattr(checkpoint.file_type, "method", None)
        python = engine.interpreter(method)
        if python is None:
            raise KernelError(engine.missing(method))
        if (reason := engine.refusal(checkpoint)) is not None:
            raise KernelError(reason)
        self.engine, self.python, self.path = engine, python, checkpoint.path
        self.seconds, self.memory = seconds, memory or 16 * checkpoint.numel + 4 * 2**30
        self.stored, self.said, self.device = stored, dict[str, Any](), "cpu"
        if room is not None and engine.devices and stored is None:
            self.device = str(room.place_for(4 * checkpoint.numel + WORK)[0])

    def logits(
        self,
        windows: Sequence[list[int]],
        first: int = 0,
        new: int = 0,
        scratch: Path | None = None,
        texts: Sequence[str] = (),
        class_name: str | None = None,
    ) -> Iterator[np.ndarray]:
        """Of each window in turn, by way of files in `scratch`: the model is loaded once, and we hold one.
        texts: are tokenized by the engine, where it can; `said` has "tokens" then. class_name: of
        transformers, where it is not the one that config.json names.

        KernelError where the script fails or takes too much.
        """
        with tempfile.TemporaryDirectory(dir=scratch, prefix="fewbits-engine-") as name:
            folder = Path(name)
            task, output = folder / "task.json", folder / "output.txt"
            asked = {"windows": windows, "first": first, "new": new, "imports": self.engine.imports}
            asked |= {"class": class_name, "texts": texts, "threads": torch.get_num_threads()}
            asked |= {"stored": self.stored, "device": self.device}
            task.write_text(json.dumps(asked), encoding="utf-8")
            script = str(SCRIPTS / self.engine.script)
            command = [self.python, script, str(self.path.resolve()), str(task), name]
            with output.open("wb") as out:
                process = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment(), cwd=name)
            try:
                for i in range(len(windows)):
                    part = folder / f"{i}.npy"
                    self._wait(process, folder / f"{i + 1}.npy")
                    _check(process, output, part.exists())
                    yield np.load(part)
                    part.unlink()
                self._wait(process)
                self.said = json.loads(_check(process, output)[-1])
            finally:
                process.kill()
                process.wait()

    def _wait(self, process: subprocess.Popen[bytes], until: Path | None = None) -> None:
        """Until the process ends or the file is there; KernelError beyond its time or resident bytes."""
        start, status = time.monotonic(), Path(f"/proc/{process.pid}/status")
        while process.poll() is None and not (until and until.exists()):
            if time.monotonic() - start > self.seconds:
                raise KernelError(f"it took more than {self.seconds:.0f} s")
            try:
                lines = status.read_text(encoding="utf-8").splitlines()
            except (FileNotFoundError, ProcessLookupError):  # it has just ended; or there is no /proc
                lines = []
            resident = next((int(li.split()[1]) * 1024 for li in lines if li.startswith("VmRSS")), 0)
            if resident > self.memory:
                raise KernelError(f"it took more than {self.memory / 2**30:.1f} GiB of memory")
            time.sleep(0.05)

    def environment(self) -> dict[str, str]:
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
        variables = {**os.environ, **quiet, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
        if self.python != sys.executable:
            variables.pop("PYTHONPATH", None)
        elif self.engine.imports:  # this very package, wherever it was imported from
            here = [str(Path(__file__).parents[2]), *variables.get("PYTHONPATH", "").split(os.pathsep)]
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, here))
        return variables


def _check(process: subprocess.Popen[bytes], output: Path, written: bool = True) -> list[str]:
    """The lines that the script printed; KernelError where it failed."""
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if process.poll() or not written:
        raise KernelError(f"exit code {process.returncode}: {' | '.join(lines[-3:]) or 'no output'}")
    return lines
