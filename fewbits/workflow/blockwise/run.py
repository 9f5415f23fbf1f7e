"""Block by block: a float checkpoint in, the same checkpoint with quantized weights out.

    tokens -> embeddings -> x                    and x~, the float model's, where mismatch is wanted
    for each block:
        stats  = capture(block, x)               one block in memory
        weights, stats = transforms              checked on the block's output, or dropped
        q      = algorithm(weight, format, stats), site by site, in the order in which inputs reach them
        learned rounding, if asked
        store.write(block, q)                    workflow/blockstore.py: a killed run goes on from here
        x      = quantized block (x)             the next block sees what this one has become
    distill, if asked: block scales and norms of the whole model

With Method.sequential the statistics of a site are taken when the sites before it in its block are
quantized; capture stops as soon as the input wanted has been seen, so a block costs about one forward
pass more. Finished blocks of a resumed run are only run, not quantized again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

import torch

from ...activations.record import record
from ...algorithms import CalibrationWarning
from ...blocks.activations import Activations
from ...blocks.block import Block
from ...blocks.model import BlockModel
from ...calibrate.capture import FloatStream, advance, capture
from ...devices import Busy, Room, return_device_memory
from ...errors import CalibrationError
from ...files.checkpoint import Checkpoint, LazyTensor
from ...formats.plain import unstored
from ...model.sites import Site, sites
from ...train.distill import DistillSettings, distill
from ...transforms import TRANSFORMS
from ..blockstore import BlockStore
from ..task import Spec, WeightRecord, measured
from .job import BlockJob, Records, decoded
from .settings import Note, Run
from .stages import Batches, quantize_paused, read_once, stages_of

Progress = Callable[[str, int, int], None]
TRAINED = "trained"  # in the metadata of a checkpoint: history, and record of activations, of its training


def quantize_blocks(
    run: Run, store: BlockStore, progress: Progress | None = None
) -> tuple[Checkpoint, Records, tuple[str, ...]]:
    """-> the checkpoint with the weights asked for quantized, what each cost, and notes for the receipt.

    Raises CalibrationError naming the block or site for what cannot be calibrated; the blocks that
    are finished stay in `store`.
    """
    tensors: dict[str, LazyTensor] = dict(run.checkpoint.tensors)
    records: Records = {}
    notes: list[Note] = []
    n, stack, n_stacks = 0, 0, 1
    while stack < n_stacks:  # a decoder reads what its quantized encoder gives
        so_far = replace(run, checkpoint=replace(run.checkpoint, tensors=dict(tensors)))
        walk = _Walk(so_far, store, progress or (lambda stage, done, total: None), stack, n)
        last = n + walk.model.n_blocks
        if not all(store.has(i) for i in range(n, last)):
            with Busy(run.streaming.place) as busy:
                walk.go()
            if busy.share is not None:
                notes.append(
                    Note(f"{run.streaming.place} was busy {busy.share:.0%} of the time, block by block")
                )
        for i in range(n, last):
            _take(store, i, tensors, records, notes)
        n, stack, n_stacks = last, stack + 1, walk.model.n_stacks
        if walk.model.hears_noise:
            notes.append(Note("the encoder reads no text: the decoder is calibrated on noise for its output"))
    trained = None
    if run.method.trains:
        if not store.has(n):
            quantized = replace(run.checkpoint, tensors=dict(tensors))
            _distill(run, quantized, records, store, n, progress)
        trained = _take(store, n, tensors, records, notes)[TRAINED]
    notes += _without_pairs(run, notes)
    metadata = run.checkpoint.metadata if trained is None else {**run.checkpoint.metadata, TRAINED: trained}
    return replace(run.checkpoint, tensors=tensors, metadata=metadata), records, _gathered(notes)


def _without_pairs(run: Run, notes: Sequence[Note]) -> list[Note]:
    """A note, which is a warning too, where transforms were asked for and none of their pairs was scaled."""
    asked = [name for name in run.method.transforms if name in TRANSFORMS]
    if not asked or any(note.kind == "scaled" for note in notes):
        return []
    reason = next(
        (note.text for note in notes if note.kind in ("dropped", "no pairs")), "no pair gained by it"
    )
    text = f"{', '.join(asked)} changed nothing: {reason}"
    warnings.warn(text, CalibrationWarning, stacklevel=2)
    return [Note(text)]


def _take(
    store: BlockStore, i: int, tensors: dict[str, LazyTensor], records: Records, notes: list[Note]
) -> dict[str, Any]:
    """Add a finished block to these; -> what was kept beside its tensors."""
    entries, kept = store.read(i)
    tensors.update(entries)
    records.update({name: WeightRecord.from_dict(row) for name, row in kept["records"].items()})
    notes += [Note(*note) for note in kept["notes"]]
    return kept


def _kept(records: Records, notes: Sequence[Note]) -> dict[str, Any]:
    """What the store keeps beside a block's tensors."""
    rows = {name: record.to_dict() for name, record in records.items()}
    return {"records": rows, "notes": [[note.text, note.kind] for note in notes]}


def _distill(
    run: Run, quantized: Checkpoint, records: Records, store: BlockStore, at: int, progress: Progress | None
) -> None:
    """Distil scales and norms of the quantized model; kept in the store as one more block."""
    method, steps = run.method, run.method.trains
    state, scheme = store.folder / "distill.state", run.activations
    said = None if scheme is None else record(quantized, scheme, run.tokens.windows)
    distilled = distill(
        run.checkpoint,
        quantized,
        run.tokens.windows,
        DistillSettings(
            steps=steps,
            state=state,
            device=str(_place_of_whole(run)),
            keep_zeros=method.pruning is not None,
            seed=run.streaming.seed,
            **method.training(),
        ),
        progress,
        said,
    )
    changed: Records = {}
    for name, value in distilled.tensors.items():
        if name in records:
            w, old, q = run.checkpoint.tensors[name].load(), records[name], unstored(value)
            spec = Spec(q.format, old.algorithm, {**old.options, method.training_name: steps})
            cost = measured(w, q, spec, None)  # type: ignore[arg-type]
            zeros = old.zeros and old.zeros.trained(unstored(quantized.tensors[name].load()), q)
            changed[name] = replace(cost, tokens=old.tokens, zeros=zeros)
    kept = _kept(changed, [Note(text) for text in distilled.notes])
    history = [asdict(judgement) for judgement in distilled.history]
    trained = {"history": history, "activations": distilled.activations}
    store.write(at, distilled.tensors, {**kept, TRAINED: trained})


def _place_of_whole(run: Run) -> torch.device:
    """The device on which the whole model is trained, in f32: the first that has room."""
    return Room(run.streaming.device).place_for(4 * run.method.copies * run.checkpoint.numel)[0]


class _Walk:
    """The model, its activations, and how far the walk is. first: number in the store of this stack's first
    block."""

    def __init__(self, run: Run, store: BlockStore, progress: Progress, stack: int, first: int):
        self.run, self.store, self.progress = run, store, progress
        self.first = first
        self.model = BlockModel(run.checkpoint, run.streaming.dtype, run.streaming.place, stack)
        self.sites = {site.name: site for site in sites(run.checkpoint) if site.name in run.specs}
        self.total = sum(_size(site) for site in self.sites.values())
        self.done = 0
        self.seen: set[str] = set()
        self.waits = True  # may batches wait inside a block?
        self.reader = ThreadPoolExecutor(1)
        self.ahead: dict[int, Future[dict[str, torch.Tensor]]] = {}
        self.writer = ThreadPoolExecutor(1)
        self.written: Future[None] | None = None

    def go(self) -> None:
        """Quantize every block that the store does not hold yet."""
        streaming, windows = self.run.streaming, self.run.calibration
        limit = streaming.activation_memory // (2 if self.run.method.gptaq else 1)
        with torch.no_grad(), Activations((), limit, streaming.scratch) as x:
            widest = max((max(site.shape) for site in self.sites.values()), default=1)
            for batch in windows.split(streaming.rows(windows.shape[1], widest)):
                x.append(self.model.embed(batch))
            if not self.run.method.gptaq:
                self._blocks(x, None)
                return
            with Activations(x, limit, streaming.scratch) as floats:
                self._blocks(x, floats)

    def _blocks(self, x: Activations, floats: Activations | None) -> None:
        try:
            self._walk(x, floats)
        finally:
            self._wait()

    def _walk(self, x: Activations, floats: Activations | None) -> None:
        for i in range(self.model.n_blocks):
            rest = range(self.first + i + 1, self.first + self.model.n_blocks)
            more = not all(self.store.has(later) for later in rest)
            if self.store.has(self.first + i):
                block = self._replay(i, self._weights(i), floats)
                through = False
            else:
                block, through = self._quantized(i, x, floats)
            if more and not through:
                advance(block, x, x)
            del block

    def _weights(self, i: int) -> dict[str, torch.Tensor]:
        """Of block i, in f32 on the CPU: a GPU gets each when its codes are chosen. Those of the next block
        are read meanwhile."""
        if self.model.device.type == "cpu":
            return self.model.weights(i)
        here = torch.device("cpu")
        ahead = self.ahead.pop(i, None)
        weights = self.model.weights(i, here) if ahead is None else ahead.result()
        if i + 1 < self.model.n_blocks:
            self.ahead = {i + 1: self.reader.submit(self.model.weights, i + 1, here)}
        return weights

    def _replay(self, i: int, weights: Mapping[str, torch.Tensor], floats: Activations | None) -> Block:
        """A block that is quantized already: only its effect on what follows is wanted."""
        block = self.model.block(i, weights)
        for name in weights:
            if name in self.sites:
                self._tell(i, "done before: ", self.sites[name], None)
        if floats is not None:
            advance(block, floats, floats)
        entries, _ = self.store.read(self.first + i)
        block.set({name: decoded(tensor.load()) for name, tensor in entries.items()})
        return block

    def _quantized(self, i: int, x: Activations, floats: Activations | None) -> tuple[Block, bool]:
        """`_quantize` with batches that are halved where a GPU has no memory for them. CalibrationError where
        a single sequence is too much."""
        notes: list[Note] = []
        while True:
            try:
                return self._quantize(i, x, floats, notes)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            if self.waits:
                self.waits = False
                continue
            longest = max(len(batch) for batch in x)
            if longest == 1:
                raise CalibrationError(
                    f"block {i} with one sequence of {x[0].shape[1]} tokens does not fit the memory of "
                    f"{self.model.device} ({reason}); take a smaller --context, or --device cpu"
                )
            for each in (x, floats):
                if each is not None:
                    each.halve()
            text = f"out of memory on {self.model.device}: batches of {-(-longest // 2)} from block {i} on"
            notes = [Note(text)]

    def _quantize(
        self, i: int, x: Activations, floats: Activations | None, notes: Sequence[Note]
    ) -> tuple[Block, bool]:
        """Quantize one block into the store -> it with its quantized weights; is x its output already?"""
        method, weights = self.run.method, self._weights(i)
        return_device_memory(self.model.device)
        wanted = [self.sites[name] for name in weights if name in self.sites]
        job = BlockJob(self.run, i, self.model.block(i, weights), weights, self._tell)
        job.notes += notes
        if wanted:
            job.transform(wanted, x)
        # Float stream and learning need the float weights to the end; else one copy of the block is enough.
        job.keeps = floats is not None or method.learn is not None
        reference = self.model.block(i, job.weights) if job.keeps else job.block
        fits = bool(wanted) and self._fits(wanted, x, floats)
        groups = read_once(wanted, job.block, x) if fits else None
        if groups is not None:
            weights = {n: w.clone() for n, w in job.weights.items()} if job.keeps else job.weights
            job.block = self.model.block(i, weights)
            job.block.in_place = True
            quantize_paused(job, wanted, groups, reference, x, floats)
        elif wanted:
            for stage in stages_of(wanted) if method.sequential else [wanted]:
                given = None if floats is None else FloatStream(floats, reference)
                job.quantize(stage, capture(job.block, x, stage, job.needs_hessian(stage), given))
        if wanted and method.learn is not None:
            with Activations((), self.run.streaming.activation_memory, self.run.streaming.scratch) as targets:
                advance(reference, x if floats is None else floats, targets)
                job.learn(wanted, cast(Batches, x), cast(Batches, targets))
        if floats is not None and groups is None:
            advance(reference, floats, floats)
        self._keep(i, job)
        return job.block, groups is not None

    def _keep(self, i: int, job: BlockJob) -> None:
        """Store a finished block. A GPU goes on meanwhile: a fault of the disk ends the run at the next."""
        write = partial(self.store.write, self.first + i, job.result, _kept(job.records, job.notes))
        if self.model.device.type == "cpu":
            write()
            return
        self._wait()
        self.written = self.writer.submit(write)

    def _wait(self) -> None:
        """Until the block before is stored."""
        if self.written is not None:
            self.written.result()

    def _fits(self, wanted: Sequence[Site], x: Activations, floats: Activations | None) -> bool:
        """May all batches wait inside the block at once? Not experts: batches reach them in another order."""
        method, experts = self.run.method, any(site.expert is not None for site in wanted)
        if not self.waits or not method.sequential or method.learn or experts:
            return False
        width = 6 * x[0].shape[-1] + max(site.shape[1] for site in wanted)
        streams = 1 if floats is None else 2
        nbytes = self.run.calibration.numel() * width * x[0].element_size() * streams
        return nbytes <= self.run.streaming.activation_memory

    def _tell(self, i: int, what: str, site: Site, error: float | None) -> None:
        short = ".".join(site.name.removesuffix(".weight").rsplit(".", 2)[-2:])
        last = "" if error is None else f", last error {error:.3f}"
        self.progress(f"block {i + 1}/{self.model.n_blocks} {what}{short}{last}", self.done, self.total)
        if site.name not in self.seen:
            self.seen.add(site.name)
            self.done += _size(site)


def _size(site: Site) -> int:
    return site.shape[0] * site.shape[1]


def _gathered(notes: Sequence[Note]) -> tuple[str, ...]:
    """Notes that differ; those of a kind as one, with the first and their number."""
    kinds: dict[Note | str, list[str]] = {}
    for note in notes:
        kinds.setdefault(note.kind or note, []).append(note.text)
    return tuple(
        texts[0] + (f" (and {len(texts) - 1} more)" if isinstance(kind, str) and texts[1:] else "")
        for kind, texts in kinds.items()
    )
