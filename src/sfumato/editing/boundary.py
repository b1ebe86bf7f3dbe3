"""Hyperplanes between two classes of latents, and the noise level at which they separate best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato import core, grids, solvers
from sfumato.core import Context, Denoiser, Grid, InputError, MissingExtra, linear
from sfumato.denoisers.features import bottleneck, features

FEWEST = 10  # of each class: fewer points are always separable, whatever they are


@dataclass(frozen=True, eq=False)
class LinearBoundary:
    """The hyperplane <n, x> + b = 0 between two classes; its positive side is the class.

    normal  (*) of length 1; offset: b
    spread  standard deviation of the signed distances of the items it was fitted to: a scale that does not depend on the
            dimension
    """

    normal: Tensor
    offset: float = 0.0
    spread: float = 1.0

    @staticmethod
    def fit(latents: Tensor, labels: Tensor, penalty: float = 1.0) -> LinearBoundary:
        """The linear support vector machine of latents (N, *) and labels bool (N,); ``penalty`` is its C.

        InputError with fewer than 10 items of a class. Needs scikit-learn (extra 'science').
        """
        flat, wanted = _checked(latents, labels)
        machine = _machine(penalty).fit((flat @ flat.T).numpy(), wanted.numpy())
        weights = torch.from_numpy(machine.dual_coef_[0]) @ flat[torch.from_numpy(machine.support_).long()]
        length = _length(weights, flat)
        normal, offset = weights / length, float(machine.intercept_[0]) / length
        spread = float((flat @ normal).std())
        return LinearBoundary(normal.to(latents.dtype).view(latents.shape[1:]), offset, spread)

    @staticmethod
    def between_means(latents: Tensor, labels: Tensor) -> LinearBoundary:
        """The hyperplane half way between the two class means, across their difference."""
        flat, wanted = _checked(latents, labels)
        yes, no = flat[wanted].mean(0), flat[~wanted].mean(0)
        length = _length(yes - no, flat)
        normal = (yes - no) / length
        offset = -float(normal @ (yes + no)) / 2
        return LinearBoundary(normal.to(latents.dtype).view(latents.shape[1:]), offset, float((flat @ normal).std()))

    def distance(self, x: Tensor) -> Tensor:
        """The signed distance of each item from the hyperplane (N,)."""
        return (x * self.normal).flatten(1).sum(1) + self.offset

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """The share of items on their side."""
        return float(((self.distance(x) > 0) == labels.bool()).double().mean())

    def moved(self, x: Tensor, distance: float | Tensor) -> Tensor:
        """The nearest point of each item at this signed distance, a number or one an item: x + (d - distance(x)) n."""
        return linear(
            1.0,
            x,
            torch.as_tensor(distance, dtype=x.dtype, device=x.device) - self.distance(x),
            self.normal.expand_as(x),
        )  # type: ignore[no-any-return]


class Encoded(NamedTuple):
    """x (N, *) at the time t of an inversion, and h (N, *), the output of one submodule there."""

    x: Tensor
    h: Tensor


@torch.no_grad()
def encode(
    denoiser: Denoiser,
    x0: Tensor,
    time: float,
    *,
    steps: int = 40,
    grid: str | Grid = "uniform",
    cond: Mapping[str, Any] | None = None,
    path: str | None = None,
    batch: int = 64,
) -> Encoded:
    """Data x0 (N, *) brought up to t = time by DDIM, with what the network's bottleneck (or ``path``) says there."""
    path = bottleneck(denoiser) if path is None else path
    times = grids.registry.make(grid) if isinstance(grid, str) else grid
    xs, hs = [], []
    for rows in torch.arange(len(x0)).split(batch):
        ctx = Context.of(len(rows), None, cond=_rows(cond, rows), dtype=x0.dtype, device=x0.device)
        x: Any = x0[rows]
        for st in core.trajectory(denoiser, solvers.get("ddim"), times, steps, x=x, start=0.0, stop=time, ctx=ctx):
            x = st.x
        xs.append(x)
        hs.append(features(denoiser, x, time, ctx, [path])[1][path])
    return Encoded(torch.cat(xs), torch.cat(hs))


@dataclass(frozen=True, eq=False)
class Boundaries:
    """The hyperplanes of one attribute at t = time: in the state, and in the output of the submodule ``path``."""

    x: LinearBoundary
    h: LinearBoundary
    time: float
    path: str

    @staticmethod
    def fit(
        denoiser: Denoiser,
        x0: Tensor,
        labels: Tensor,
        time: float,
        *,
        penalty: float = 1.0,
        path: str | None = None,
        **options: Any,
    ) -> Boundaries:
        """From labelled data x0 (N, *); options as in :func:`encode`."""
        path = bottleneck(denoiser) if path is None else path
        found = encode(denoiser, x0, time, path=path, **options)
        return Boundaries(
            LinearBoundary.fit(found.x, labels, penalty), LinearBoundary.fit(found.h, labels, penalty), time, path
        )


class Level(NamedTuple):
    """What is known of one time: cross-validated accuracy of a hyperplane between the inverted states, and the mean
    radius |x| / sqrt(d) of inverted and of sampled states."""

    time: float
    accuracy: float
    inverted: float
    sampled: float


@torch.no_grad()
def critical_time(
    denoiser: Denoiser,
    x0: Tensor,
    labels: Tensor,
    *,
    levels: int = 10,
    steps: int = 40,
    cond: Mapping[str, Any] | None = None,
    groups: Tensor | None = None,
    gap: float | None = None,
    seed: int = 0,
    batch: int = 64,
) -> tuple[float, list[Level]]:
    """(time, curve): where to edit. The noisiest time at which a hyperplane between inverted states is as accurate, in cross
    validation, as at the best time within one standard error: as much is left to be decided as can be while the classes are
    still apart.

    levels  candidates, spread evenly over the ``steps`` steps of one inversion; steps is a multiple of it
    groups  (N,) items that must not be on both sides of a split (drawings of one subject)
    gap     only times where the radii of inverted and of sampled states differ by at most gap sqrt(d); None: any. Flat
            backgrounds make every inversion untypical

    If no time meets the gap, InputError. The published text gives no formula: this rule is ours. Source: Zhu, Wu, Deng,
    Russakovsky, Yan, 2023, "Boundary Guided Learning-Free Semantic Control with Diffusion Models".
    """
    if steps % levels:
        raise InputError(f"{levels} levels of {steps} steps: give a number of steps that is a multiple of the levels")
    every, uniform, ddim = steps // levels, grids.get("uniform"), solvers.get("ddim")
    up: list[list[Tensor]] = []
    down: list[list[Tensor]] = []
    streams, times = core.Streams.of(seed, len(x0)), list[float]()
    for rows in torch.arange(len(x0)).split(batch):
        for kept, given in ((up, {"x": x0[rows], "start": 0.0, "stop": 1.0}), (down, {"shape": tuple(x0[rows].shape)})):
            ctx = Context(
                cond=_rows(cond, rows),
                rng=streams.select(rows.tolist()),
                batch=len(rows),
                dtype=x0.dtype,
                device=x0.device,
            )
            run: list[Any] = sorted(
                core.trajectory(denoiser, ddim, uniform, steps, ctx=ctx, **given), key=lambda s: s.t
            )  # type: ignore[arg-type]
            times = [s.t for s in run][every::every]
            kept.append([s.x for s in run][every::every])
    curve = []
    for i, time in enumerate(times):
        here, sampled = (torch.cat([part[i] for part in kept]) for kept in (up, down))
        curve.append(Level(time, cross_validated(here, labels, groups), radius(here), radius(sampled)))
    return _noisiest(curve, len(x0), gap), curve


def _noisiest(curve: Sequence[Level], n: int, gap: float | None) -> float:
    """The largest time whose accuracy is within a standard error, of n items, of the best one's."""
    typical = [level for level in curve if gap is None or abs(level.inverted - level.sampled) <= gap]
    if not typical:
        worst = ", ".join(f"{v.time:.2f}: {abs(v.inverted - v.sampled):.3f}" for v in curve)
        raise InputError(
            f"at no time have inverted and sampled states the same radius within {gap} ({worst}): raise gap"
        )
    best = max(level.accuracy for level in typical)
    enough = best - (best * (1 - best) / n) ** 0.5
    return max(level.time for level in typical if level.accuracy >= enough)


def radius(x: Tensor) -> float:
    """The mean over items of |x| / sqrt(d): 1 for white noise."""
    return float(x.flatten(1).norm(dim=1).mean() / x[0].numel() ** 0.5)


def cross_validated(
    latents: Tensor, labels: Tensor, groups: Tensor | None = None, folds: int = 5, penalty: float = 1.0
) -> float:
    """The accuracy of a linear support vector machine on items left out, over folds with equal shares of the classes.

    groups  (N,) items that stay in one fold together. Needs scikit-learn (extra 'science').
    """
    flat, wanted = _checked(latents, labels)
    kernel, machine = (flat @ flat.T).numpy(), _machine(penalty)
    from sklearn.model_selection import StratifiedGroupKFold

    groups = torch.arange(len(flat)) if groups is None else groups
    right = 0
    for learned, left in StratifiedGroupKFold(folds).split(kernel, wanted.numpy(), groups.numpy()):
        machine.fit(kernel[learned][:, learned], wanted[learned].numpy())
        right += int((machine.predict(kernel[left][:, learned]) == wanted[left].numpy()).sum())
    return right / len(flat)


def _machine(penalty: float) -> Any:
    """A linear machine on the matrix of inner products: as fast in a million dimensions as in ten."""
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise MissingExtra("scikit-learn", extra="science") from None
    return SVC(kernel="precomputed", C=penalty)


def _checked(latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(float64 vectors (N, D), labels bool (N,)); InputError with too few of a class."""
    wanted = labels.bool().cpu()
    fewest = int(min(wanted.sum(), (~wanted).sum()))
    if len(wanted) != len(latents) or fewest < FEWEST:
        raise InputError(
            f"{len(latents)} latents, {len(wanted)} labels, {fewest} of the rarer class: one label each, at least "
            f"{FEWEST} of both classes"
        )
    return latents.detach().flatten(1).double().cpu(), wanted


def _length(normal: Tensor, flat: Tensor) -> float:
    """The length of a normal; InputError where it is round-off of the latents (N, D)."""
    length = float(normal.norm())
    if not length > 1e-12 * float(flat.norm()):
        raise InputError("nothing tells the two classes apart: their latents are the same, or have the same mean")
    return length


def _rows(cond: Mapping[str, Any] | None, rows: Tensor) -> dict[str, Any]:
    """The conditions of some of the items."""
    return {k: v[rows] if isinstance(v, Tensor) else v for k, v in (cond or {}).items()}


__all__: Sequence[str] = [
    "Boundaries", "Encoded", "Level", "LinearBoundary", "critical_time", "cross_validated", "encode", "radius",
]  # fmt: skip
