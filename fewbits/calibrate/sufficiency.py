"""The number of tokens that statistics need; a shortfall is reported with both numbers.

Hessian. Of t independent inputs with k columns, the eigenvalues of the sample's H lie, relative to the true
H, between (1 - sqrt(k/t))^2 and (1 + sqrt(k/t))^2 (Marchenko and Pastur 1967). The lower edge misleads an
algorithm: errors in a direction that the sample underestimates seem cheap. With fewer tokens than columns, H
is singular and some directions seem free. Error feedback is a regression of each column on the others, whose
error on new text exceeds that on the sample by 1 / (1 - k/t) on average. The rule is t >= 4 k: no direction
is underestimated below (1 - 1/2)^2 = 1/4, and the error is at most a third larger.

Mean square of each column (all that importance needs). The relative standard error of a mean of x^2 is
sqrt((kurtosis - 1) / t), and independent of k.
The rule is a standard error of 10 % at kurtosis 25: t >= 24 / 0.1^2 = 2400. The median column of the
demo model has 3.2 before attention and MLP (a normal has 3), 7 before the attention's output and 25
before the MLP's.

Tokens of a text are correlated, so both rules are lower bounds. The count is that of tokens that reached the
site: for an expert, of those routed to it.
"""

from __future__ import annotations

from math import ceil

from .stats import Stats

TOKENS_PER_COLUMN = 4
KURTOSIS = 25
STANDARD_ERROR = 0.1


def tokens_needed(stats: Stats) -> int:
    """By the rule for the given statistics: a Hessian, or mean squares only."""
    return needed_for(stats.columns, stats.hessian is not None)


def needed_for(columns: int, hessian: bool) -> int:
    """The same for statistics that are not in memory."""
    if hessian:
        return TOKENS_PER_COLUMN * columns
    return ceil((KURTOSIS - 1) / STANDARD_ERROR**2)


def shortfall(stats: Stats) -> str | None:
    """A sentence with the seen and the needed number of tokens, if they are too few; else None."""
    seen, needed = stats.count, tokens_needed(stats)
    if seen >= needed:
        return None
    if seen == 0:
        return f"no token reached it, {needed} are needed; calibrate on more text or quantize it without"
    if stats.hessian is None:
        what = f"the mean square of a column is off by {100 * ((KURTOSIS - 1) / seen) ** 0.5:.0f} %"
    elif seen < stats.columns:
        what = f"the Hessian of {stats.columns} columns is singular"
    else:
        low = (1 - (stats.columns / seen) ** 0.5) ** 2
        what = f"the Hessian of {stats.columns} columns understates some errors {_times(low)}"
    return f"{seen} tokens seen, {needed} are needed: {what}; calibrate on {needed / seen:.1f} times the text"


def _times(low: float) -> str:
    return f"{1 / low:.0f} times" if low > 1e-3 else "without limit"
