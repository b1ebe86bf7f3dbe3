"""Distances between two sets of features: Frechet, kernel (two kernels), sliced Wasserstein."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.core.errors import InputError
from sfumato.evaluation.measurement import Measurement, jackknife_interval
from sfumato.evaluation.metrics._tensors import blocks, count, pair, squared_distances

Kernel = Callable[[Tensor, Tensor], Tensor]
GROUPS = 10


def frechet_from_moments(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> float:
    """The squared 2-Wasserstein distance of two Gaussians, |m - m'|^2 + tr S + tr S' - 2 tr (S^1/2 S' S^1/2)^1/2.

    Means (d,), covariances (d, d). With factors A^T A = S and B^T B = S' from eigenvalues, the last trace is the sum of
    the singular values of A B^T: no square root of a nearly singular product, and 0 to round-off for equal arguments.
    Source: Dowson and Landau (1982), The Frechet distance between multivariate normal distributions.

    Raises:
        InputError: shapes that do not fit, or a covariance that is not symmetric and positive semi-definite.
    """
    d = mean.numel()
    if mean.shape != (d,) or other_mean.shape != (d,) or cov.shape != (d, d) or other_cov.shape != (d, d):
        shapes = ", ".join(str(tuple(t.shape)) for t in (mean, cov, other_mean, other_cov))
        raise InputError(f"two means (d,) and two covariances (d, d) are wanted, got {shapes}")
    mean, cov, other_mean, other_cov = (t.detach().double() for t in (mean, cov, other_mean, other_cov))
    overlap = torch.linalg.svdvals(_factor(cov) @ _factor(other_cov).T).sum()
    return _frechet(mean - other_mean, cov.trace(), other_cov.trace(), overlap)


def frechet_distance(
    samples: Tensor,
    reference: Tensor,
    *,
    seed: int = 0,
    groups: int = GROUPS,
    debiased: bool = False,
    singular: bool = False,
) -> Measurement:
    """The Frechet distance of Gaussians fitted to samples (N, d) and reference (M, d); lower is better.

    With n items the estimate is biased upwards by about c/n, so distances at different n do not compare. The note gives
    the jackknife's estimate of that bias, and ``debiased=True`` subtracts it (the figure may then be negative). The
    interval leaves out each of ``groups`` random parts of either set in turn; it is about the value at these counts,
    not about its limit. With fewer than d + 1 items a covariance is singular and most of the distance is bias: an error
    unless ``singular=True``. Source: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter (2017), GANs trained by a two
    time-scale update rule; Chong and Forsyth (2020), Effectively unbiased FID and inception score.
    """
    x, y = pair(samples, reference)
    _enough("samples", x, singular)
    _enough("reference", y, singular)
    x, y = x - y.mean(0), y - y.mean(0)
    mean_x, cov_x = _moments(x)
    mean_y, cov_y = _moments(y)
    factor_x, factor_y = _factor(cov_x), _factor(cov_y)
    overlap = torch.linalg.svdvals(factor_x @ factor_y.T).sum()
    value = _frechet(mean_x - mean_y, cov_x.trace(), cov_y.trace(), overlap)
    left_x = _frechet_left_out(x, mean_y, factor_y, groups, seed)
    left_y = _frechet_left_out(y, mean_x, factor_x, groups, seed + 1)
    bias = sum((groups - 1) * (left.mean().item() - value) for left in (left_x, left_y))
    value, name = (value - bias, "frechet distance, debiased") if debiased else (value, "frechet distance")
    interval = jackknife_interval(value, left_x, left_y)
    low, high, method = interval if debiased else interval.within(low=0.0)
    note = f"bias of {bias:.3g} removed" if debiased else f"biased upwards by about {bias:.3g} at these counts"
    return Measurement(name, value, low, high, len(x), len(y), higher_is_better=False, interval=method, note=note)


def _enough(name: str, x: Tensor, singular: bool) -> None:
    n, d = x.shape
    if n < d + 1 and not singular:
        raise InputError(
            f"{n} {name} cannot fill a covariance of {d} features: at least {d + 1} are needed. "
            "Use more items, fewer features (PCAFeatures), kernel_distance, or singular=True to have it anyway"
        )


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def _factor(cov: Tensor) -> Tensor:
    """A with A^T A = cov, by eigenvalues; those within round-off of zero count as zero."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    scale = values.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    if values.min() < -1e-7 * scale or (cov - cov.T).abs().max() > 1e-7 * scale:
        raise InputError(
            f"not a covariance: it is symmetric with no negative eigenvalue, the least is {values.min().item():.3g}"
        )
    return values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T


def _frechet(shift: Tensor, trace: Tensor, other_trace: Tensor, overlap: Tensor) -> float:
    return (shift.square().sum() + trace + other_trace - 2 * overlap).item()


def _parts(n: int, groups: int, seed: int, device: torch.device) -> list[Tensor]:
    """Indices of ``groups`` random parts whose sizes differ by at most 1."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)
    return [order[g::groups] for g in range(groups)]


def _frechet_left_out(x: Tensor, other_mean: Tensor, factor: Tensor, groups: int, seed: int) -> Tensor:
    """The distance to a fixed Gaussian, covariance factor^T factor, with each part of x left out, (groups,).

    Scatter matrices are downdated, in the coordinates factor @ x where only one set of eigenvalues is left to find.
    """
    count("groups", groups, 2, max(2, len(x) // 2), f"parts of {len(x)} items")
    n, mean, found = len(x), x.mean(0), []
    x = x - mean
    z = x @ factor.T
    scatter, trace, other_trace = z.T @ z, x.square().sum(), factor.square().sum()
    for part in _parts(n, groups, seed, x.device):
        rest, gone, gone_z = n - len(part), x[part], z[part]
        shift, shift_z = gone.sum(0) / rest, gone_z.sum(0) / rest
        left = (scatter - gone_z.T @ gone_z - rest * torch.outer(shift_z, shift_z)) / (rest - 1)
        left_trace = (trace - gone.square().sum() - rest * shift.square().sum()) / (rest - 1)
        # Only the spread of these replicates counts, so eigenvalues of the product are accurate enough here.
        overlap = torch.linalg.eigvalsh(left).clamp(min=0).sqrt().sum()
        found.append(_frechet(mean - shift - other_mean, left_trace, other_trace, overlap))
    return torch.tensor(found, dtype=torch.float64)


def kernel_distance(samples: Tensor, reference: Tensor, *, degree: int = 3) -> Measurement:
    """The unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^degree; lower is better.

    It uses every pair once instead of averaging random subsets, which has the same expectation and less variance; it
    may be negative. The interval is the jackknife over items of both sets, exact from the row sums of the kernel.
    Source: Binkowski, Sutherland, Arbel, Gretton (2018), Demystifying MMD GANs.
    """
    x, y = pair(samples, reference, at_least=3)
    degree = count("degree", degree, 1, 9, "the power of the polynomial kernel")
    width = x.shape[1]
    return _mmd(
        x, y, lambda a, b: (a @ b.T / width + 1) ** degree, "kernel distance", f"polynomial kernel, degree {degree}"
    )


def rbf_distance(samples: Tensor, reference: Tensor, *, bandwidth: float | None = None, seed: int = 0) -> Measurement:
    """The unbiased squared maximum mean discrepancy with the kernel exp(-|x - y|^2 / (2 h^2)); lower is better.

    ``bandwidth`` h defaults to the median distance between pairs of the pooled items (at most 2,000 of them, drawn by
    the seed), so two comparisons share a kernel only if h is given. Source: Gretton, Borgwardt, Rasch, Scholkopf, Smola
    (2012), A kernel two-sample test.
    """
    x, y = pair(samples, reference, at_least=3)
    h = median_distance(torch.cat([x, y]), seed=seed) if bandwidth is None else float(bandwidth)
    if not (math.isfinite(h) and h > 0):
        raise InputError(f"bandwidth {h:g}: a positive number is wanted (more than half of the items are equal?)")
    return _mmd(
        x,
        y,
        lambda a, b: squared_distances(a, b).mul_(-0.5 / h**2).exp_(),
        "rbf distance",
        f"Gaussian kernel, h = {h:.6g}",
    )


def median_distance(x: Tensor, *, most: int = 2000, seed: int = 0) -> float:
    """The median distance between two different items of x (N, d), over at most ``most`` items drawn by the seed."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:most].to(x.device)
    return torch.pdist(x[order.sort().values].double()).median().item()


def _mmd(x: Tensor, y: Tensor, kernel: Kernel, name: str, note: str) -> Measurement:
    """A/(n(n-1)) + B/(m(m-1)) - 2C/(nm), where A, B sum the kernel over pairs of different items and C over all."""
    n, m = len(x), len(y)
    within_x, within_y = _sums_within(x, kernel), _sums_within(y, kernel)
    cross_x, cross_y = _sums_across(x, y, kernel)
    a, b, c = within_x.sum(), within_y.sum(), cross_x.sum()
    term_x, term_y = a / (n * (n - 1)), b / (m * (m - 1))
    value = (term_x + term_y - 2 * c / (n * m)).item()
    left_x = (a - 2 * within_x) / ((n - 1) * (n - 2)) + term_y - 2 * (c - cross_x) / ((n - 1) * m)
    left_y = (b - 2 * within_y) / ((m - 1) * (m - 2)) + term_x - 2 * (c - cross_y) / ((m - 1) * n)
    low, high, method = jackknife_interval(value, left_x, left_y)
    return Measurement(name, value, low, high, n, m, higher_is_better=False, interval=method, note=note)


def _sums_across(x: Tensor, y: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    rows, columns = [], torch.zeros(len(y), dtype=x.dtype, device=x.device)
    for part in blocks(len(x), len(y)):
        block = kernel(x[part], y)
        rows.append(block.sum(1))
        columns += block.sum(0)
    return torch.cat(rows), columns


def _sums_within(x: Tensor, kernel: Kernel) -> Tensor:
    """Row sums of the kernel matrix without its diagonal."""
    rows = []
    for part in blocks(len(x), len(x)):
        block = kernel(x[part], x)
        block.diagonal(part.start).zero_()
        rows.append(block.sum(1))
    return torch.cat(rows)


def wasserstein_1d(x: Tensor, y: Tensor, p: float = 2.0) -> Tensor:
    """sum_k w_k |x_(i_k) - y_(j_k)|^p for every column of x (n, L) and y (m, L): W_p^p, exact for unequal counts, (L,).

    The quantile functions are steps at i/n and j/m; between two steps both are constant. Steps are compared as integers
    (i m against j n), so equal ones coincide exactly. Source: Peyre and Cuturi (2019), Computational optimal transport,
    2.6.
    """
    n, m = len(x), len(y)
    x, y = x.sort(0).values, y.sort(0).values
    if n == m:
        return (x - y).abs_().pow_(p).mean(0)
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique().to(x.device)
    widths = torch.diff(ends, prepend=ends.new_zeros(1)).to(x.dtype) / (n * m)
    gaps = (x[(ends - 1) // m] - y[(ends - 1) // n]).abs_().pow_(p)
    return widths @ gaps


def sliced_wasserstein(
    samples: Tensor, reference: Tensor, *, projections: int = 128, groups: int = GROUPS, seed: int = 0
) -> Measurement:
    """The root of the mean over random directions u of W_2^2(u.x, u.y); lower is better.

    Each one-dimensional distance is exact, also for unequal counts. The interval leaves out random parts of the
    samples, of the reference and of the directions. Positive at finite counts even for equal distributions. Source:
    Bonneel, Rabin, Peyre, Pfister (2015), Sliced and Radon Wasserstein barycenters of measures.
    """
    x, y = pair(samples, reference)
    count("projections", projections, 2, 1 << 16, "random directions")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(x.device)
    x, y = x @ directions, y @ directions
    squares = wasserstein_1d(x, y)
    left = []
    for rows, against, at in ((x, y, seed), (y, x, seed + 1)):
        count("groups", groups, 2, max(2, len(rows) // 2), f"parts of {len(rows)} items")
        keep = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for part in _parts(len(rows), groups, at, rows.device):
            left.append(wasserstein_1d(rows[keep.index_fill(0, part, False)], against).mean().sqrt())
    parts = (torch.stack(left[:groups]), torch.stack(left[groups:]))
    without = ((squares.sum() - squares) / (projections - 1)).clamp(min=0).sqrt()
    value = squares.mean().sqrt().item()
    low, high, method = jackknife_interval(value, *parts, without).within(low=0.0)
    note = f"{projections} directions"
    return Measurement(
        "sliced wasserstein distance", value, low, high, len(samples), len(reference),
        higher_is_better=False, interval=method, note=note,
    )  # fmt: skip
