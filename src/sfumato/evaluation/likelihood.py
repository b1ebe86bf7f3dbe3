"""The density of a diffusion model: exact change of variables along its probability flow, and densities on a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Grid, InputError, linear
from sfumato.denoisers.interpolants import GaussianMixtureInterpolant
from sfumato.processes.interpolant import Interpolant

Field = Callable[[Tensor, float], Tensor]
Constant = Callable[[Tensor], Tensor]  # a field that does not change in time


def log_likelihood(
    denoiser: Denoiser,
    x: Tensor,
    *,
    steps: int = 100,
    divergence: str = "exact",
    probes: int = 1,
    start: float = 0.0,
    grid: Grid | None = None,
    base: Callable[[Tensor], Tensor] | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """log p(x) in nats, (B,) float64, of the density that the probability flow of ``denoiser`` makes of the noise.

    log p(x) = log p_1(x_1) + int div b along the flow dx = b dt from x at ``start`` to x_1, by Heun's method with two calls
    a step. A Gaussian law is integrated in u = x / hypot(alpha, sigma) over the angle atan2(sigma, alpha), where
    du = (cos eps - sin x0) dangle is finite at both ends (VP, VE, alpha(1) = 0); an interpolant in t.

    x           (B, *); at ``start`` > 0 it is the state there, and the density that of the marginal at ``start``
    divergence  'exact': one backward pass a dimension | 'hutchinson': v^T (db/dx) v averaged over ``probes`` random signs
                v, one backward pass each, drawn once an item for the whole path: an unbiased estimate of the exact sum
    grid        times, flipped (default: equal angles; for an interpolant equal times)
    base        log density (B, *) -> (B,) of the far end; default: the law's own prior, N(0, sigma(1)^2) in most
    cond, seed  as in ``sfumato.sample``; item i draws its probes from stream (seed, i) and never depends on the batch

    Raises InputError for unknown words, and where a network says nothing about x0 at alpha = 0.
    Source: Chen, Rubanova, Bettencourt, Duvenaud, 2018, "Neural Ordinary Differential Equations"; Grathwohl et al., 2019,
    "FFJORD"; Song et al., 2021, "Score-Based Generative Modeling through Stochastic Differential Equations".
    """
    if divergence not in ("exact", "hutchinson") or probes < 1:
        raise InputError(
            f"divergence = {divergence!r}, probes = {probes}: 'exact', or 'hutchinson' with at least one probe"
        )
    if not (isinstance(steps, int) and steps >= 1 and 0 <= start < 1):
        raise InputError(f"steps = {steps}, start = {start}: a whole number, at least 1, and 0 <= start < 1")
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
        raise InputError("x is a floating-point tensor (B, *) of states")
    ctx = Context.of(len(x), seed, cond=dict(cond or {}), dtype=x.dtype, device=x.device)
    signs = [_signs(x, ctx) for _ in range(probes)] if divergence == "hutchinson" else None
    two_sided = isinstance(denoiser.process, Interpolant)
    run = _in_time if two_sided else _in_angle
    x1, change = run(denoiser, x.detach(), ctx, steps, start, grid, signs)
    if base is not None:
        anchor = denoiser.process.anchor(1.0, ctx.cond)
        return base(linear(1.0, x1, 1.0, anchor)).double() + change
    if two_sided:
        raise InputError("the far end of an interpolant is a density of its own: give base=, its log density")
    return _prior(denoiser.process, x1, ctx) + change


def bits_per_dimension(log_likelihood: Tensor, shape: Sequence[int], width: float = 1 / 127.5) -> Tensor:
    """-log2 of the probability of one of the discrete values, a dimension: -(log p / d + ln width) / ln 2.

    shape  of one item; width of the bin of a value: 1 / 127.5 for bytes scaled to [-1, 1]. x itself should have been
    dequantised with uniform noise of that width; the figure is then an upper bound of the discrete model's.
    """
    d = math.prod(shape)
    if d < 1 or not width > 0:
        raise InputError(f"shape = {tuple(shape)}, width = {width}: at least one dimension, and a width above 0")
    return -(log_likelihood / d + math.log(width)) / math.log(2)


def _in_angle(
    denoiser: Denoiser, x: Tensor, ctx: Context, steps: int, start: float, grid: Grid | None, signs: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """(y_1, log |dy_1 / dx|) of a Gaussian law, in solver coordinates."""
    process = denoiser.process
    ts = _times(process, steps, start, grid or _equal_angles)
    coefs = [process.coef(t) for t in ts]
    radii = [math.hypot(c.alpha, c.sigma) for c in coefs]
    places = [c.angle for c in coefs]
    radius = dict(zip(places, radii, strict=True))
    time = dict(zip(places, ts, strict=True))

    def field(u: Tensor, place: float) -> Tensor:
        post = denoiser(u * radius[place], time[place], ctx)
        return post.at(-math.sin(place), math.cos(place))  # type: ignore[no-any-return]

    y = linear(1.0, x, -1.0, process.anchor(ts[0], ctx.cond))
    u, change = _heun(field, y / radii[0], places, signs)
    d = x[0].numel()
    return u * radii[-1], change + d * (math.log(radii[-1]) - math.log(radii[0]))


def _in_time(
    denoiser: Denoiser, x: Tensor, ctx: Context, steps: int, start: float, grid: Grid | None, signs: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    ts = _times(denoiser.process, steps, start, grid or _equal_times)
    return _heun(lambda x, t: denoiser(x, t, ctx).view("flow"), x, ts, signs)


def _heun(field: Field, x: Tensor, places: Sequence[float], signs: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """x carried along dx = field dplace by the trapezoid rule, and the integral of the divergence (B,), float64."""
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for a, b in zip(places, places[1:], strict=False):
        slope, div = _with_divergence(field, x, a, signs)
        slope_ahead, div_ahead = _with_divergence(field, x + (b - a) * slope, b, signs)
        x = x + (b - a) / 2 * (slope + slope_ahead)
        total = total + (b - a) / 2 * (div + div_ahead)
    return x, total


def _with_divergence(field: Field, x: Tensor, place: float, signs: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """The field at x (B, *) and its divergence (B,), float64; rows must not act on each other."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        out = field(x, place)
        flat = out.flatten(1)
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if signs is None:
            for i in range(flat.shape[1]):
                total += _pulled(flat[:, i].sum(), x).flatten(1)[:, i]
        else:
            for v in signs:
                total += (_pulled((out * v).sum(), x) * v).flatten(1).sum(1).double() / len(signs)
    return out.detach(), total


def _pulled(scalar: Tensor, x: Tensor) -> Tensor:
    if not scalar.requires_grad:  # a field that is constant in x
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(scalar, x, retain_graph=True, materialize_grads=True)
    return gradient


def _signs(x: Tensor, ctx: Context) -> Tensor:
    """Rademacher noise: +-1 with equal chances, item by item."""
    assert ctx.rng is not None
    return torch.where(ctx.rng.uniform(torch.empty_like(x, dtype=torch.float64)) < 0.5, -1.0, 1.0).to(x)


def _prior(process: Any, y: Tensor, ctx: Context) -> Tensor:
    """log density of the law's prior at y (B, *): normal around what it draws with noise 0."""
    mean = process.prior(
        y.shape, Context(cond=ctx.cond, dtype=y.dtype, device=y.device, source=lambda c, fresh: torch.zeros_like(y))
    )
    std, d = process.coef(1.0).sigma, y[0].numel()
    square = ((y - mean).double() / std).flatten(1).square().sum(1)
    return -0.5 * square - d * (math.log(std) + 0.5 * math.log(2 * math.pi))  # type: ignore[no-any-return]


def _times(process: Any, steps: int, start: float, grid: Grid) -> list[float]:
    ts: list[float] = grid(process, steps, 1.0, start).flip(0).tolist()
    return ts


def _equal_angles(process: Any, n: int, start: float, stop: float) -> Tensor:
    a, b = process.coef(start).angle, process.coef(stop).angle
    inner = [process.time(-math.log(math.tan(a + (b - a) * i / n))) for i in range(1, n)]
    return torch.tensor([start, *inner, stop], dtype=torch.float64)


def _equal_times(process: Any, n: int, start: float, stop: float) -> Tensor:
    return torch.linspace(start, stop, n + 1, dtype=torch.float64)


def random_fields(count: int, size: float, *, wavelength: float = 3.0, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """``count`` smooth fields x (N, d) -> (count, N, d) of root mean square ``size``: errors to inject.

    Each component is a sum of three plane waves of about this wavelength.
    """
    rng = torch.Generator().manual_seed(seed)

    def waves(x: Tensor) -> Tensor:
        d = x.shape[1]
        rng.manual_seed(seed)
        numbers = torch.randn(count, 3, d, d, generator=rng, dtype=torch.float64) * (2 * math.pi / wavelength / d**0.5)
        phases = torch.rand(count, 3, 1, d, generator=rng, dtype=torch.float64) * 2 * math.pi
        angle = torch.einsum("nj,kwij->kwni", x, numbers) + phases
        return size * (2 / 3 / d) ** 0.5 * torch.sin(angle).sum(1)

    return waves


def plane_density(
    drift: Callable[[Tensor, float], Tensor], epsilon: float, density: Callable[[Tensor], Tensor], *, half_width: float,
    cells: int = 96, steps: int = 150,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The density at r = 1 of dx = drift(x, r) dr + sqrt(2 epsilon) dw in the plane, from ``density`` at r = 0.

    drift    (N, 2), r -> (N, 2) or (K, N, 2) for K drifts at once
    returns  the cells' centres (cells^2, 2) and the densities there (K, cells^2), float64

    Finite volumes on the square [-half_width, half_width]^2 without flux through its edges, exponentially fitted fluxes
    (mass is kept and nothing becomes negative), Heun's method in r.
    Raises InputError where the steps are too long for the cells. Source: Scharfetter & Gummel, 1969, "Large-signal
    analysis of a silicon Read diode oscillator".
    """
    if not epsilon > 0:
        raise InputError(f"epsilon = {epsilon}: the equation needs diffusion, a number above 0")
    h, dr = 2 * half_width / cells, 1 / steps
    edges = torch.linspace(-half_width, half_width, cells + 1, dtype=torch.float64)
    centres = (edges[1:] + edges[:-1]) / 2
    points = torch.cartesian_prod(centres, centres)
    faces = torch.cartesian_prod(edges[1:-1], centres), torch.cartesian_prod(centres, edges[1:-1])
    rho = density(points).reshape(1, cells, cells)

    def change(rho: Tensor, r: float) -> Tensor:
        out, leaves = torch.zeros_like(rho), torch.zeros(())
        for axis, face in enumerate(faces):
            speed = drift(face, r)[..., axis].reshape(-1, *(cells - (axis == k) for k in (0, 1)))
            low, high = rho.narrow(axis + 1, 0, cells - 1), rho.narrow(axis + 1, 1, cells - 1)
            up, down = _bernoulli(-speed * h / epsilon), _bernoulli(speed * h / epsilon)
            out = out - torch.diff(_walled(epsilon / h**2 * (up * low - down * high), axis), dim=axis + 1)
            rate = _walled(epsilon / h**2 * up, axis), _walled(epsilon / h**2 * down, axis)
            leaves = leaves + rate[0].narrow(axis + 1, 1, cells) + rate[1].narrow(axis + 1, 0, cells)
        if dr * float(leaves.max()) > 1:
            raise InputError(f"{steps} steps are too few for {cells} cells of width {h:g}: raise steps or lower cells")
        return out

    for i in range(steps):
        first = change(rho, i * dr)
        rho = rho + dr / 2 * (first + change(rho + dr * first, (i + 1) * dr))
    return points, rho.flatten(1)


def _walled(flux: Tensor, axis: int) -> Tensor:
    """Fluxes through the inner faces, and 0 through the two outer ones."""
    none = torch.zeros_like(flux.narrow(axis + 1, 0, 1))
    return torch.cat([none, flux, none], axis + 1)


def _bernoulli(z: Tensor) -> Tensor:
    """z / (exp(z) - 1)."""
    small = z.abs() < 1e-5
    z = torch.where(small, 1.0, z)
    return torch.where(small, 1.0, z / torch.expm1(z))


def kl_of_errors(
    mixtures: GaussianMixtureInterpolant, process: Interpolant, errors: tuple[Constant, Constant],
    epsilon: float, *, half_width: float, cells: int = 96, steps: int = 150,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What errors of velocity and score do to samples of an interpolant in the plane: (KL, bound, split bound), each (K,).

    The backward equation dx = (-b + epsilon s) dr + sqrt(2 epsilon) dw, r = 1 - t, is run from the exact x1 with b + db
    and s + ds. KL(rho_0 || its end) <= int E|epsilon ds - db|^2 dt / (4 epsilon) <= int (E|db|^2 / epsilon + epsilon
    E|ds|^2) dt / 2, with expectations under the exact law; all three are sums over one grid.

    errors   fields db, ds: x (N, 2) -> (K, N, 2), K errors of each
    Source: Albergo, Boffi, Vanden-Eijnden, 2023, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions".
    """
    db, ds = errors
    wrong = cache(lambda x: epsilon * ds(x) - db(x))  # asked at the same points at all times

    def drift(x: Tensor, r: float) -> Tensor:
        exact = mixtures.readings(x, process.at(1 - r))
        return epsilon * exact["score"] - exact["flow"] + wrong(x)

    def density(x: Tensor, t: float) -> Tensor:
        return mixtures.log_prob(x, process.at(t)).exp()

    grid = {"half_width": half_width, "cells": cells, "steps": steps}
    points, found = plane_density(drift, epsilon, lambda x: density(x, 1.0), **grid)  # type: ignore[arg-type]
    area, true = (2 * half_width / cells) ** 2, density(points, 0.0)
    kl = (true * (true / found.clamp(min=torch.finfo(found.dtype).tiny)).log().nan_to_num(neginf=0.0)).sum(1) * area
    mass = area * sum(density(points, (i + 0.5) / steps) for i in range(steps)) / steps
    bound = wrong(points).square().sum(-1) @ mass / (4 * epsilon)
    split = (db(points).square() / epsilon + epsilon * ds(points).square()).sum(-1) @ mass / 2
    return kl, bound, split
