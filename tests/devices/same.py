"""What may differ between devices: nothing on the pretended one; elsewhere the order of sums."""

import torch

from fewbits.qtensor import QTensor

from .pretend import NAME


def same_tensor(
    found: torch.Tensor,
    wanted: torch.Tensor,
    exact: bool = True,
    differing: float = 1e-3,
    error: float = 1e-3,
) -> None:
    """Codes (integers) may differ in a share `differing`, numbers by a relative `error`. exact: on `pretend`,
    whose arithmetic is the CPU's, they are equal."""
    assert wanted.device.type == "cpu" and found.device.type != "cpu"
    exact, here = exact and found.device.type == NAME, found.cpu()
    assert here.shape == wanted.shape and here.dtype == wanted.dtype
    if exact:
        assert torch.equal(here, wanted), f"{float((here != wanted).double().mean()):.2%} differ"
    elif wanted.is_floating_point():
        lost = (here.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
        assert lost < error, f"{float(lost):.2g} apart"
    else:
        assert (here != wanted).double().mean() < differing


def same_codes(found: QTensor, wanted: QTensor, differing: float = 1e-3) -> None:
    """Codes differ in a share of them at most; what they decode to then by so little."""
    (_, here), (_, there) = (each.format.unpack(each) for each in (found, wanted))
    share = float((here.cpu() != there).double().mean())
    assert share <= differing, f"{share:.2%} of the codes differ"
    a, b = found.decode().cpu().double(), wanted.decode().double()
    assert (a - b).norm() <= 0.03 * b.norm()
