"""One block on its way: float weights in, quantized and rewritten tensors out, and what they cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ...algorithms import NEEDS, CalibrationWarning
from ...blocks.activations import Activations
from ...blocks.block import Block
from ...calibrate.capture import Capture, capture
from ...calibrate.stats import Stats
from ...calibrate.sufficiency import shortfall
from ...errors import CalibrationError
from ...formats.plain import stored
from ...memory import return_freed_memory
from ...model.sites import Site
from ...qtensor import QTensor
from ...train.rounding import EFFORTS, learn_block
from ...transforms import TRANSFORMS, Choice, applied, checked, find_pairs, rescaled
from ..task import Spec, WeightRecord, chosen, kept_of, measured
from .ahead import Ahead, Candidate, Chosen
from .settings import Note, Run

Records = dict[str, WeightRecord]
Tell = Callable[[int, str, Site, float | None], None]

# |(w' - w) x| / |w x| of a weight set to zero is 1: beyond this the error has exploded.
LARGEST_ERROR = 2.0


class BlockJob:
    """Block `index` of a run. weights: all its tensors, f32; rewritten by `transform`.

    result: what the block's tensors became. records: what each quantized one cost. notes: for the receipt.
    tell: is called before each site with its last neighbour's output error. keeps: are the float weights of
    finished sites still needed?
    """

    def __init__(self, run: Run, index: int, block: Block, weights: dict[str, torch.Tensor], tell: Tell):
        self.run, self.index, self.block, self.weights, self.tell = run, index, block, weights, tell
        self.result: dict[str, torch.Tensor | QTensor] = {}
        self.records: Records = {}
        self.notes: list[Note] = []
        self.stats: dict[str, Stats] = {}  # only where `learn` will measure again: they are large
        self.masks: dict[str, torch.Tensor | None] = {}  # of the sites of a stage
        self.error: float | None = None
        self.keeps = True

    def needs_hessian(self, stage: Sequence[Site]) -> bool:
        return any(self.run.specs[site.name].needs_hessian for site in stage)

    def transform(self, wanted: Sequence[Site], x: Activations) -> None:
        """Rewrite the float weights as the method says, by the pairs that leave the block's output alone."""
        asked = [name for name in self.run.method.transforms if name in TRANSFORMS]
        tensors = {name: self.run.checkpoint.tensors[name] for name in self.weights}
        pairs = find_pairs(replace(self.run.checkpoint, tensors=tensors)) if asked else []
        if not pairs:
            text = f"no pairs: block {self.index} has none that can be scaled"
            self.notes += [Note(text, "no pairs")] if asked else []
            return
        stats = dict(capture(self.block, x, wanted).stats)
        unseen = [pair for pair in pairs if not {*pair.consumers} <= stats.keys()]  # experts without a token
        self.notes += [Note(f"dropped: {pair.name}: no token reached it", "dropped") for pair in unseen]
        pairs = [pair for pair in pairs if pair not in unseen]
        formats = {site.name: self.run.specs[site.name].format for site in wanted}
        self.weights = {name: weight.to(self.block.device) for name, weight in self.weights.items()}
        chosen: list[Choice] = []
        for name in asked:
            options = self.run.method.transform_options if name == "smooth" else {}
            now = self.weights | applied(self.weights, chosen)
            scaled = TRANSFORMS.get(name)(now, pairs, stats, formats, **options)
            for pair, scale in scaled:
                stats |= {key: rescaled(stats[key], pair, scale) for key in pair.consumers if key in stats}
            chosen += scaled
        kept, dropped = checked(self.weights, chosen, self._sample(x[0]))
        self.notes += [
            Note(f"dropped: {name}: the block's output moved by {moved:.2g}", "dropped")
            for name, moved in dropped.items()
        ]
        self.notes += [Note(f"scaled: {pair.name}", "scaled") for pair, _ in kept]
        new = applied(self.weights, kept)
        self.weights |= new
        self.block.set(new)
        self.result |= {name: value.cpu() for name, value in new.items() if name not in self.run.specs}

    def _sample(self, hidden: torch.Tensor) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
        """Weights to replace -> the block's output on one sequence, in f32: bf16 hides small changes."""
        return lambda changed: self.block(hidden[:1], {**self.weights, **changed}, torch.float32)

    def quantize(self, stage: Sequence[Site], captured: Capture) -> None:
        """Choose codes for the sites of one stage, and put them into the block."""
        self.notes += [Note(text) for text in captured.notes]
        quantized: dict[str, QTensor] = {}
        self.masks = {site.name: self._mask(site, captured.stats.get(site.name)) for site in stage}
        groups = self._together(stage, captured)
        ahead = Ahead([self._candidate(each, captured.stats.get(each[0].name)) for each in groups])
        for turn, together in enumerate(groups):
            for site in together:
                self.tell(self.index, "", site, self.error)
            known = ahead.take(turn)
            quantized |= self._sites(together, captured.stats.get(together[0].name), known)
        for site in stage:
            self.block.set({site.name: quantized[site.name].decode()})
            if not self.keeps:
                del self.weights[site.name]

    def _mask(self, site: Site, stats: Stats | None) -> torch.Tensor | None:
        """What pruning keeps of a weight: known for all sites of a stage before the first of them is rounded,
        since they share a factor of the Hessian that rounding does not."""
        spec = self.run.specs[site.name].with_what_is_known(stats)
        if spec.pruning is None:
            return None
        return kept_of(site.name, self.weights[site.name].to(self.block.device), spec, stats)

    def _together(self, stage: Sequence[Site], captured: Capture) -> list[list[Site]]:
        """Sites whose codes are chosen at once. On a GPU, which small weights leave idle: those that read one
        input, and whose rows do not depend on one another."""
        groups: dict[object, list[Site]] = {}
        for site in stage:
            spec, stats = self.run.specs[site.name], captured.stats.get(site.name)
            alone = self.block.device.type == "cpu" or stats is None or not spec.format.rows_alone
            like = (id(stats), spec.format.name, spec.algorithm, *sorted(spec.options.items()))
            groups.setdefault(site.name if alone else like, []).append(site)
        return list(groups.values())

    def _candidate(self, sites: Sequence[Site], stats: Stats | None) -> Candidate | None:
        """Sites of one spec and one input as a weight whose codes may be chosen together with others."""
        name = sites[0].name
        if stats is None or stats.hessian is None:
            return None
        shape = sum(site.shape[0] for site in sites), sites[0].shape[1]
        again = self.run.checkpoint.tensors[name].quantized
        return Candidate(self.run.specs[name], stats, shape, lambda: self._joined(sites), again)

    def _joined(self, sites: Sequence[Site]) -> torch.Tensor:
        """The weights of these sites, one below another, where the model is."""
        weights = [self.weights[site.name].to(self.block.device) for site in sites]
        return torch.cat(weights) if len(sites) > 1 else weights[0]

    def _sites(
        self, sites: Sequence[Site], stats: Stats | None, known: Chosen | None = None
    ) -> dict[str, QTensor]:
        """Choose codes for sites of one spec and one input, where the model is; keep them on the CPU. known:
        the sites' joined weights and codes, if these are chosen already."""
        first, spec = sites[0], self.run.specs[sites[0].name]
        if stats is None:
            self.notes.append(Note(f"unseen: {first.name} met no token and is rounded to nearest", "unseen"))
            spec = spec.with_what_is_known(None)
        else:
            if self.run.method.learn is not None:
                self.stats |= dict.fromkeys((site.name for site in sites), stats)
            if NEEDS[spec.algorithm] != "nothing" or (spec.pruning and spec.pruning.needs != "nothing"):
                self._check_tokens(first, stats)
        joined = self._joined(sites) if known is None else known.w
        rows = [self.weights[site.name].shape[0] for site in sites]
        weights = dict(zip((site.name for site in sites), joined.split(rows), strict=True))
        return_freed_memory()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            masks = [mask for site in sites if (mask := self.masks[site.name]) is not None]
            again = self.run.checkpoint.tensors[first.name].quantized
            keep = torch.cat(masks) if masks else None
            if known is None:
                whole, spec = chosen(" and ".join(weights), joined, spec, stats, again, keep)
            else:
                whole = known.q
        for warning in caught:
            if issubclass(warning.category, CalibrationWarning):
                self.notes.append(Note(f"{first.name}: {warning.message}"))
            else:  # not of this weight: whoever listens to warnings is to hear it
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno, source=warning.source
                )
        start, found = 0, {}
        for site in sites:
            w = weights[site.name]
            found[site.name] = whole if len(sites) == 1 else whole.take_rows(slice(start, start + len(w)))
            record = measured(w, found[site.name], spec, stats, self.masks[site.name])
            self._accept(site, found[site.name], record)
            start += len(w)
        return found

    def _accept(self, site: Site, q: QTensor, record: WeightRecord) -> None:
        self.error = record.output_error
        if self.error is not None and not self.error <= LARGEST_ERROR:
            raise CalibrationError(
                f"{site.name}: its output error is {self.error:g} times its output, more than "
                f"{LARGEST_ERROR:g}; finished blocks are kept: give this weight another format with a rule, "
                "or more tokens, and run again"
            )
        self.result[site.name] = stored(q.to("cpu"))
        self.records[site.name] = record

    def _check_tokens(self, site: Site, stats: Stats) -> None:
        missing = shortfall(stats)
        if missing is None:
            return
        if self.run.strict:
            raise CalibrationError(f"{site.name}: {missing}")
        self.notes.append(Note(f"few tokens: {site.name}: {missing}", "few tokens"))

    def learn(
        self, wanted: Sequence[Site], x: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> None:
        """Learned rounding of all sites together, from the codes chosen so far."""
        level = self.run.method.learn
        if level is None:
            return
        self.tell(self.index, "learning to round ", wanted[-1], self.error)
        wanted = [site for site in wanted if isinstance(self.result[site.name], QTensor)]
        formats = {site.name: self.run.specs[site.name].format for site in wanted}
        start = {name: value for name in formats if isinstance(value := self.result[name], QTensor)}
        settings = replace(EFFORTS[level], keep_zeros=self.run.method.pruning is not None)
        with torch.enable_grad():
            learned = learn_block(self.block, self.weights, formats, start, x, targets, settings)
        for site in wanted:
            old, q = self.records[site.name], learned[site.name]
            spec = Spec(q.format, old.algorithm, {**old.options, "learn": level})
            w = self.weights[site.name].to(self.block.device)
            record = measured(w, q, spec, self.stats.get(site.name))
            zeros = old.zeros and old.zeros.trained(start[site.name], q)
            self._accept(site, q, replace(record, zeros=zeros))
        self.block.set({name: q.decode() for name, q in learned.items()})


def decoded(value: torch.Tensor | QTensor) -> torch.Tensor:
    return value.decode() if isinstance(value, QTensor) else value.float()
