"""What every metric needs: checks that name the argument, and work in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sfumato.core.errors import InputError

# Entries of the largest float64 block a metric makes at once: 32 MB.
BLOCK = 1 << 22


def features(name: str, x: Tensor, at_least: int = 2) -> Tensor:
    """A finite (N, d) feature tensor in float64, on its own device (on the CPU where the device has no float64).

    Raises:
        InputError: not a tensor, not (N, d), complex, too few rows, or a value that is not finite.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{name}: a tensor (N, d) is wanted, got {type(x).__name__}; torch.as_tensor makes one")
    if x.dim() != 2 or x.shape[1] < 1:
        raise InputError(f"{name}: features are (N, d), got shape {tuple(x.shape)}; x.flatten(1) makes them of items")
    if x.is_complex():
        raise InputError(
            f"{name}: real features are wanted, got {x.dtype}; torch.view_as_real(x).flatten(1) makes them"
        )
    if len(x) < at_least:
        raise InputError(f"{name}: at least {at_least} items are needed, got {len(x)}")
    x = double(x)
    finite = x.isfinite().all(1)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise InputError(
            f"{name}: {bad} of {len(x)} items hold NaN or infinity; the first is item {int(finite.int().argmin())}"
        )
    return x


def pair(samples: Tensor, reference: Tensor, at_least: int = 2) -> tuple[Tensor, Tensor]:
    """Two checked feature tensors of one width, on the device of the first."""
    x, y = features("samples", samples, at_least), features("reference", reference, at_least)
    same_width("samples", x, "reference", y)
    return x, y.to(x.device)


def same_width(first: str, x: Tensor, second: str, y: Tensor) -> None:
    """InputError unless both are features of as many numbers, by the names they are called."""
    if x.shape[1] != y.shape[1]:
        raise InputError(
            f"{first} have {x.shape[1]} features and {second} {y.shape[1]}: both must come from the same extractor"
        )


def double(x: Tensor) -> Tensor:
    """The tensor in float64, off the graph."""
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()


def count(name: str, value: int, low: int, high: int, why: str) -> int:
    """An integer argument within its range."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} = {value!r}: an integer from {low} to {high} is wanted ({why})")
    return value


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of the rows such that rows x width stays within :data:`BLOCK` entries."""
    step = max(1, BLOCK // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 by the matrix product, (n, m), good to :func:`round_off`; never negative."""
    return torch.addmm(x.square().sum(1, keepdim=True) + y.square().sum(1), x, y.T, alpha=-2).clamp_(min=0)


def round_off(x: Tensor, y: Tensor) -> Tensor:
    """The error bound of :func:`squared_distances`: rows below it cannot be told apart by the matrix product."""
    return 64 * torch.finfo(torch.float64).eps * (x.square().sum(1, keepdim=True) + y.square().sum(1))


def nearest(queries: Tensor, keys: Tensor, k: int, skip_self: bool = False) -> tuple[Tensor, Tensor]:
    """Distances and indices, both (N, k), of the k nearest keys of each query in float64, nearest first.

    ``skip_self``: queries and keys are the same items, and item i is not its own neighbour. Candidates are found by the
    matrix product and measured again by subtraction, so equal rows are at distance exactly 0.
    """
    centre = keys.mean(0)
    q, p = queries - centre, keys - centre
    candidates = min(k + 4, len(keys) - skip_self)
    distances, indices = [], []
    for rows in blocks(len(q), max(len(p), candidates * p.shape[1])):
        square = squared_distances(q[rows], p)
        if skip_self:
            square[torch.arange(square.shape[0]), torch.arange(rows.start, rows.stop)] = torch.inf
        index = square.topk(candidates, largest=False).indices
        exact = (queries[rows].unsqueeze(1) - keys[index]).norm(dim=2)
        order = exact.argsort(dim=1, stable=True)[:, :k]
        distances.append(exact.gather(1, order))
        indices.append(index.gather(1, order))
    return torch.cat(distances), torch.cat(indices)
