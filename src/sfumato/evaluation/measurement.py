"""A figure is never a bare number: it carries its interval, its counts and what it was computed on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.core.errors import InputError

LEVEL = 0.95


class Interval(NamedTuple):
    """A confidence interval and the method that made it, in words."""

    low: float
    high: float
    method: str

    def within(self, low: float = -math.inf, high: float = math.inf) -> Interval:
        """The part of the interval that the quantity can reach: a distance is never negative."""
        return Interval(min(max(self.low, low), high), min(max(self.high, low), high), self.method)


@dataclass(frozen=True)
class Measurement:
    """One figure: ``value`` with its interval ``low``..``high``, over ``n`` items against ``reference_n`` items.

    ``features`` and ``reference`` say in words which feature extractor and which reference set were used;
    ``higher_is_better`` is None where neither direction is. The Frechet inception distance is a figure of one
    particular Inception network, so no figure of this library may carry that name.

    Raises:
        InputError: the name is that of the Frechet inception distance, or the value is not a number.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    reference_n: int = 0
    features: str = ""
    reference: str = ""
    higher_is_better: bool | None = None
    interval: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if re.search(r"(^|[^a-z])fid([^a-z]|$)", self.name.lower()):
            raise InputError(f"{self.name!r}: FID is the figure of one Inception network; say 'frechet distance'")
        if math.isnan(self.value):
            raise InputError(f"{self.name} is not a number: look for NaN or infinity in what it was computed from")

    @staticmethod
    def mean(name: str, values: Tensor, **labels: Any) -> Measurement:
        """The mean of per-item ``values`` (N,), with Student's interval.

        ``labels`` are further fields of a Measurement. If items are infinite (the PSNR of two equal images), so is the
        mean, and the interval says how many.
        """
        values = _values(name, values)
        n, infinite = values.numel(), int(values.isinf().sum())
        if infinite:
            value = values.mean().item()
            return Measurement(name, value, value, value, n, interval=f"{infinite} of {n} items infinite", **labels)
        low, high, method = student_interval(values)
        return Measurement(name, values.mean().item(), low, high, n, interval=method, **labels)

    @staticmethod
    def median(name: str, values: Tensor, **labels: Any) -> Measurement:
        """The median of per-item ``values`` (N,), with the distribution-free interval of order statistics."""
        values = _values(name, values)
        low, high, method = median_interval(values)
        value = values.sort().values
        middle = (value[(len(value) - 1) // 2] + value[len(value) // 2]).item() / 2
        return Measurement(name, middle, low, high, len(value), interval=method, **labels)

    @staticmethod
    def share(name: str, hits: Tensor, **labels: Any) -> Measurement:
        """The mean of per-item ``hits`` (N,) in [0, 1], with Wilson's interval (conservative for fractional hits)."""
        hits = _values(name, hits)
        if bool(((hits < 0) | (hits > 1)).any()):
            raise InputError(f"{name}: hits lie in [0, 1], got {hits.min().item():g} to {hits.max().item():g}")
        low, high, method = wilson_interval(hits.mean().item(), hits.numel())
        return Measurement(name, hits.mean().item(), low, high, hits.numel(), interval=method, **labels)

    def labelled(self, **labels: Any) -> Measurement:
        """The same figure with other words: ``features``, ``reference``, ``note``, ``name``."""
        return replace(self, **labels)

    def row(self) -> dict[str, Any]:
        """The fields as JSON-able values; an infinite number becomes the text "inf" or "-inf", which JSON lacks."""
        return {key: _text_if_infinite(value) for key, value in asdict(self).items()}

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Measurement:
        """What :meth:`row` wrote."""
        known = {f.name for f in fields(Measurement)}
        missing = {"name", "value", "low", "high", "n"} - set(row)
        if missing:
            raise InputError(f"not the row of a measurement: {', '.join(sorted(missing))} missing")
        kept = {key: value for key, value in row.items() if key in known}
        return Measurement(**{**kept, **{key: float(kept[key]) for key in ("value", "low", "high")}})

    def __str__(self) -> str:
        arrow = {True: " (higher is better)", False: " (lower is better)", None: ""}[self.higher_is_better]
        against = f" against {self.reference_n}" if self.reference_n else ""
        words = [f"n = {self.n}{against} {self.reference}".rstrip(), self.features, self.interval, self.note]
        tail = "; ".join(word for word in words if word)
        return f"{self.name} {self.value:.4g} [{self.low:.4g}, {self.high:.4g}]{arrow}: {tail}"


def _text_if_infinite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _values(name: str, values: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.dim() != 1 or not values.numel():
        given = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"{name}: one value an item is wanted, a tensor (N,) with N >= 1; got {given}")
    values = values.detach().cpu().double()
    if bool(values.isnan().any()):
        raise InputError(f"{name}: {int(values.isnan().sum())} of {values.numel()} values are NaN")
    return values


def _percent(level: float) -> str:
    if not 0 < level < 1:
        raise InputError(f"level {level} of an interval: a number between 0 and 1, such as 0.95")
    return f"{100 * level:g} %"


def student_quantile(p: float, freedom: float) -> float:
    """The p-quantile of Student's t: closed forms at 1 and 2 degrees of freedom, else five terms in 1/freedom.

    Source: Abramowitz and Stegun (1964), Handbook of Mathematical Functions, 26.7.5; within 0.2 % for p <= 0.975 and at
    least 3 degrees of freedom.
    """
    if freedom < 1 or not 0 < p < 1:
        raise InputError(f"Student's quantile wants 0 < p < 1 and at least 1 degree of freedom, got {p}, {freedom}")
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**i for i, term in enumerate(terms))


def student_interval(values: Tensor, level: float = LEVEL) -> Interval:
    """mean +- t s / sqrt(N) for per-item ``values`` (N,). One item alone has no spread: the interval is everything."""
    n, method = values.numel(), f"{_percent(level)} Student"
    if n < 2:
        return Interval(-math.inf, math.inf, "one item: no interval")
    half = student_quantile(0.5 + level / 2, n - 1) * values.std().item() / math.sqrt(n)
    mean = values.mean().item()
    return Interval(mean - half, mean + half, method)


def wilson_interval(share: float, n: int, level: float = LEVEL) -> Interval:
    """The score interval of a share of n items. Source: Wilson (1927), Probable inference, the law of succession."""
    method, z = f"{_percent(level)} Wilson", NormalDist().inv_cdf(0.5 + level / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At shares 0 and 1 the bound is the share itself, which round-off would miss.
    return Interval(min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share), method)


def median_interval(values: Tensor, level: float = LEVEL) -> Interval:
    """Order statistics around the median: P(x_(k) <= median <= x_(n+1-k)) = 1 - 2 P(Binomial(n, 1/2) < k) >= level.

    Below 6 items no pair of order statistics reaches 95 %, and the interval is everything.
    """
    x, method = values.sort().values, f"{_percent(level)} order statistics"
    n, tail, k = len(x), 0.0, 0
    while k < n:
        tail += math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        if tail > (1 - level) / 2:
            break
        k += 1
    if k == 0:
        return Interval(-math.inf, math.inf, f"{n} items: too few for an interval of the median")
    return Interval(x[k - 1].item(), x[n - k].item(), method)


def jackknife_interval(value: float, *left_out: Tensor, level: float = LEVEL) -> Interval:
    """value +- t s, s^2 = sum over samples of (G - 1)/G sum_g (theta_{-g} - mean)^2.

    ``left_out`` holds one tensor (G,) for each independent sample: the statistic with group g of that sample left out.
    Groups of one item give the usual jackknife. The degrees of freedom are Welch's. Source: Efron and Stein (1981), The
    jackknife estimate of variance; Shao and Wu (1989), A general theory for jackknife variance estimation.
    """
    method = f"{_percent(level)} jackknife"
    parts, squares = [], []
    for replicates in left_out:
        groups = replicates.numel()
        if groups < 2:
            raise InputError(f"a jackknife needs at least 2 groups of each sample, got {groups}")
        part = (groups - 1) / groups * (replicates - replicates.mean()).square().sum().item()
        parts.append(part)
        squares.append(part * part / (groups - 1))
    variance = sum(parts)
    if variance == 0:
        return Interval(value, value, method)
    freedom = max(variance * variance / sum(squares), min(r.numel() for r in left_out) - 1)
    half = student_quantile(0.5 + level / 2, freedom) * math.sqrt(variance)
    return Interval(value - half, value + half, method)


def bootstrap_interval(
    statistic: Callable[..., float | Tensor],
    *samples: Tensor,
    resamples: int = 200,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Percentiles of ``statistic(*resampled)``, each sample (N, *) redrawn with replacement on its own.

    A function of the seed alone. Wrong for statistics that repeats of an item bias, such as distances between
    distributions and nearest neighbours: those use :func:`jackknife_interval`. Source: Efron (1979), Bootstrap methods.
    """
    if resamples < 20:
        raise InputError(f"{resamples} resamples are too few for a percentile: at least 20")
    method, generator = f"{_percent(level)} bootstrap", torch.Generator().manual_seed(seed)
    found = []
    for _ in range(resamples):
        picks = [torch.randint(len(x), (len(x),), generator=generator).to(x.device) for x in samples]
        found.append(float(statistic(*(x[pick] for x, pick in zip(samples, picks, strict=True)))))
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(found, dtype=torch.float64).quantile(tail).tolist()
    return Interval(low, high, method)
