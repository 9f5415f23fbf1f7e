"""SmoothQuant: outlier columns of an activation move into the weights (Xiao et al., arXiv 2211.10438).

    s = absmax(x)^alpha / absmax(w)^(1 - alpha)       x / s and W s are both easy to round

alpha = 0.5 balances both sides. Without a given alpha it is searched for each pair on the output error with
both sides rounded: exactly if samples of the inputs are given, else by a model of integers whose scale is set
by the largest observed input:

    activation   scale^2 / 12 * |W s|^2       scale = max(absmax(x) / s) / 127
    weight       tr(E H E^T)                  as in loss.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..activations.quantizers import Scheme, parse, quantize_dequantize
from ..calibrate.stats import Stats
from ..errors import CalibrationError
from ..formats.base import Format
from .loss import Reader, absmax_of, column_sizes, input_absmax, ratio, readers_of, weight_loss, weighted
from .pairs import Choice, Pair, rescaled, settled

ALPHAS = tuple(step / 20 for step in range(21))
ROWS = 256
Samples = Mapping[str, torch.Tensor]


def smooth(
    weights: Mapping[str, torch.Tensor],
    pairs: Sequence[Pair],
    stats: Mapping[str, Stats],
    formats: Mapping[str, Format | None],
    alpha: float | None = None,
    activation: str = "int8_dynamic",
    samples: Samples | None = None,
) -> list[Choice]:
    """Weights of a block, statistics and formats by consumer -> scaled pairs.

    alpha: in [0, 1]; None: searched, and a pair that gains nothing is left out. activation: the scheme of
    the inputs. samples: inputs `(t, k)` by consumer. CalibrationError if statistics are missing.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise CalibrationError(f"alpha is {alpha}, which is not between 0 and 1")
    scheme = parse(activation)
    chosen = []
    for pair in pairs:
        readers = readers_of(weights, pair, stats, formats, ROWS)
        if not readers:
            continue
        absmax, columns = input_absmax(pair, readers), column_sizes(pair, readers)
        if alpha is not None:
            chosen.append((pair, settled(weights, pair, ratio(absmax, alpha, columns, 1 - alpha))))
            continue
        best, least = None, _total(readers, pair, torch.ones_like(absmax), scheme, samples)
        for a in ALPHAS:
            scale = settled(weights, pair, ratio(absmax, a, columns, 1 - a))
            loss = _total(readers, pair, scale, scheme, samples)
            if loss < least:
                best, least = scale, loss
        if best is not None:
            chosen.append((pair, best))
    return chosen


def _total(
    readers: list[Reader], pair: Pair, scale: torch.Tensor, scheme: Scheme, samples: Samples | None
) -> float:
    if samples is None:
        return sum(_modelled(reader, pair, scale, scheme) for reader in readers)
    missing = [reader.name for reader in readers if reader.name not in samples]
    if missing:
        raise CalibrationError(
            f"{pair.name}: no sample of the input of {', '.join(missing)}; give one of each or none"
        )
    return sum(_measured(reader, pair, scale, scheme, samples[reader.name].float()) for reader in readers)


def _measured(reader: Reader, pair: Pair, scale: torch.Tensor, scheme: Scheme, x: torch.Tensor) -> float:
    """Squared output error of one consumer on its sample `(t, k)`, as if the sample were all tokens."""
    s = pair.spread(scale)
    top = (absmax_of(reader) / s).amax()
    affine = None if scheme.dynamic else scheme.affine(-top, top)
    q = weighted(reader.w * s, reader.format, rescaled(reader.stats, pair, scale)).decode()
    error = quantize_dequantize(x / s, scheme, affine) @ q.T - x @ reader.w.T
    return float(error.square().sum(dtype=torch.float64)) / max(1, x.shape[0]) * reader.share


def _modelled(reader: Reader, pair: Pair, scale: torch.Tensor, scheme: Scheme) -> float:
    if scheme.floating:
        raise CalibrationError(
            f"{pair.name}: the error of {scheme.name} is not modelled from statistics; give samples or alpha"
        )
    s = pair.spread(scale)
    activation_scale = float((absmax_of(reader) / s).amax()) / scheme.largest
    activation = activation_scale**2 / 12 * float((reader.w * s).square().sum(dtype=torch.float64))
    return activation * reader.share + weight_loss(reader, pair, scale)
