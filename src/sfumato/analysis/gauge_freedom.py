"""Which part of a field matters: conservative and gauge components, and the dimension of the data that its flow shows.

A model field S of the score splits in one way into S = grad Phi + r with div(p_t r) = 0, orthogonal in L2(p_t). The gauge r
moves mass along p_t without changing it: samples and densities are exact where grad Phi = grad log p_t, whatever r is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core import Context, Denoiser, Grid, Guidance, InputError, Posterior, Solver, Step, Wrapper, sample
from sfumato.core.trees import column
from sfumato.grids import get as grid_named
from sfumato.objectives.fokker_planck import clocks, divergence, signs
from sfumato.solvers.heun import Heun

Field = Callable[[Tensor, Any, Tensor], Tensor]
"""(x (B, *), t, score (B, *)) -> (B, *): what is added to the score."""


class Perturbed(Wrapper):
    """See :func:`perturbed`."""

    def __init__(self, inner: Denoiser, field: Field, scale: float) -> None:
        super().__init__(inner)
        self.field, self.scale = field, scale

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        post = self.inner(x, t, ctx)
        sigma = column(post.coef.sigma, x)
        added = self.field(x, t, post.view("score"))
        return post.but(eps=post.view("eps") - self.scale * sigma * added)


def perturbed(field: Field, scale: float = 1.0) -> Guidance:
    """score + scale field(x, t, score): a denoiser with a known error."""
    return lambda inner: Perturbed(inner, field, scale)


def gauge(omega: Tensor | Any, scale: float = 1.0) -> Guidance:
    """score + scale Omega score with a constant antisymmetric Omega (d, d): an exact gauge of any density on R^d.

    div(p Omega grad log p) = div(Omega grad p) = 0. States are (B, d). Raises InputError where Omega is not antisymmetric.
    Source: Horvat & Pfister, 2024, "On gauge freedom, conservativity and intrinsic dimensionality estimation in diffusion
    models" (the freedom; this family of it is elementary).
    """
    matrix = torch.as_tensor(omega, dtype=torch.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not torch.equal(matrix, -matrix.T):
        raise InputError(f"Omega of shape {tuple(matrix.shape)} is not antisymmetric: it would change the density")
    return perturbed(lambda x, t, score: score @ matrix.to(score).T, scale)


def swirl(speed: Callable[[Tensor, Any], Tensor], plane: tuple[int, int] = (0, 1)) -> Guidance:
    """score + speed(rho, t) (-y, x) in the plane of two coordinates: a gauge where p_t is symmetric about their origin.

    speed  (radius (B,), t) -> (B,). A speed that varies with the radius shears the flow without moving any mass.
    """

    def field(x: Tensor, t: Any, score: Tensor) -> Tensor:
        i, j = plane
        omega = speed(torch.hypot(x[:, i], x[:, j]), t)
        turn = torch.zeros_like(x)
        turn[:, i], turn[:, j] = -omega * x[:, j], omega * x[:, i]
        return turn

    return perturbed(field)


def score_jacobian(
    denoiser: Denoiser, x: Tensor, t: float | Tensor, *, cond: Mapping[str, Any] | None = None
) -> Tensor:
    """J[b, i, j] = d score_i / d x_j at x (B, *), (B, d, d) by d backward passes. Rows must not act on each other."""
    _, jacobian = _differentiated(lambda y: _score(denoiser, y, t, cond), x)
    return jacobian


def asymmetry(
    denoiser: Denoiser, x: Tensor, t: float | Tensor, *, probes: int | None = None,
    cond: Mapping[str, Any] | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """|J - J^T| / |J| of the score's Jacobian in the Frobenius norm, (B,): 0 for gradient fields, at most 2.

    probes  None: the exact Jacobian; else E|J v - J^T v|^2 / E|J v|^2 over that many random signs v, two passes each

    A field is conservative exactly where this is 0 everywhere (on R^d). It says nothing on whether the density is right.
    Source: Horvat & Pfister, 2024, "On gauge freedom, conservativity and intrinsic dimensionality estimation ...".
    """
    if probes is None:
        jacobian = score_jacobian(denoiser, x, t, cond=cond)
        return (jacobian - jacobian.mT).flatten(1).norm(dim=1) / jacobian.flatten(1).norm(dim=1)
    drawn = signs(x, probes, Context.of(len(x), seed, dtype=x.dtype, device=x.device))
    assert drawn is not None
    difference, size = x.new_zeros(len(x)), x.new_zeros(len(x))
    with torch.enable_grad():
        y = x.detach().requires_grad_(True)
        s = _score(denoiser, y, t, cond)
        w = torch.zeros_like(s, requires_grad=True)
        (linear_in_w,) = torch.autograd.grad(s, y, w, create_graph=True)
        for v in drawn:
            (back,) = torch.autograd.grad(s, y, v, retain_graph=True)
            (ahead,) = torch.autograd.grad(linear_in_w, w, v, retain_graph=True)
            difference += (ahead - back).flatten(1).square().sum(1)
            size += ahead.flatten(1).square().sum(1)
    return (difference / size).sqrt()


def gauge_residual(denoiser: Denoiser, exact: Denoiser, x: Tensor, t: float | Tensor) -> Tensor:
    """div r + r . grad log p, (B,), of r = score of ``denoiser`` - score of ``exact``: 0 everywhere iff r is a gauge.

    It is div(p r) / p, the rate at which the difference changes the density. ``exact`` is an oracle.
    Source: Horvat & Pfister, 2024, "On gauge freedom, conservativity and intrinsic dimensionality estimation ...".
    """
    with torch.enable_grad():
        y = x.detach().requires_grad_(True)
        true = _score(exact, y, t, None)
        r = _score(denoiser, y, t, None) - true
        return (divergence(r, y) + (r * true).flatten(1).sum(1)).detach()


class Decomposition(NamedTuple):
    """S = conservative + gauge at the given points (N, d), and E|gauge|^2 / E|S|^2 on the half that was not fitted."""

    conservative: Tensor
    gauge: Tensor
    fraction: float


def decompose(
    denoiser: Denoiser, x: Tensor, t: float, *, features: int = 64, width: float | None = None, seed: int = 0
) -> Decomposition:
    """The two components of a score at time t, on samples x (N, d) of p_t: min over Phi of E|S - grad Phi|^2.

    That minimum is the decomposition, since div(p grad Phi) = div(p S) is its Euler equation. Phi is linear plus quadratic
    plus ``features`` random cosines cos(w . x + b), w ~ N(0, 1 / width^2) (default: the rms distance from the mean),
    fitted by least squares to the first half of the points. Too small a Phi leaves part of a gradient in ``gauge``: the
    fraction of a known gradient field (an oracle at the same points) is the floor to compare with.
    Source: Horvat & Pfister, 2024 (the decomposition); Rahimi & Recht, 2007, "Random Features for Large-Scale Kernel
    Machines".
    """
    if x.ndim != 2 or len(x) < 4 or features < 1:
        raise InputError(f"x is {tuple(x.shape)}, features = {features}: samples (N, d) of p_t, and at least 1")
    with torch.no_grad():
        s = _score(denoiser, x, t, None).double()
    z, (n, d) = x.double(), x.shape
    centred = z - z.mean(0)
    scale = float(centred.square().sum(1).mean().sqrt()) if width is None else width
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(features, d, generator=rng, dtype=torch.float64).to(z.device) / scale
    phase = 2 * math.pi * torch.rand(features, generator=rng, dtype=torch.float64).to(z.device)
    waves = -torch.sin(z @ w.T + phase)[:, :, None] * w * (scale / features**0.5)
    i, j = torch.triu_indices(d, d)
    eye = torch.eye(d, dtype=torch.float64, device=z.device)
    quadratic = (centred[:, i, None] * eye[j] + centred[:, j, None] * eye[i]) / 2
    slopes = torch.cat([eye.expand(n, d, d), quadratic, waves], 1).mT  # (N, d, K) gradients of the basis
    half = n // 2
    rows, wanted = slopes[:half].reshape(half * d, -1), s[:half].reshape(-1, 1)
    fit = torch.linalg.lstsq(rows, wanted, rcond=1e-3, driver="gelsd").solution  # random waves are nearly dependent
    conservative = (slopes @ fit).squeeze(-1)
    rest = s - conservative
    return Decomposition(conservative, rest, float(rest[half:].square().sum() / s[half:].square().sum()))


class Flow(NamedTuple):
    """A flow with its Jacobian: end points x (B, *), Y = dx_stop / dx_start (B, d, d), and at each of the times (n + 1)
    the singular values of Y so far, falling, (n + 1, B, d)."""

    x: Tensor
    jacobian: Tensor
    times: Tensor
    singular_values: Tensor


def flow_jacobian(
    denoiser: Denoiser, x: Tensor, *, steps: int = 100, start: float = 1.0, stop: float = 1e-3,
    solver: Solver | None = None, grid: Grid | str = "quadratic", cond: Mapping[str, Any] | None = None,
) -> Flow:  # fmt: skip
    """Carry x (B, *) and Y, dY = (dv / dx) Y, along the probability flow from ``start`` to ``stop``, either way.

    Y is the product of the exact Jacobians of the solver's steps (default Heun), each by d backward passes a step, in the
    dtype of x: float64 keeps singular values that differ by many orders. Raises InputError for solvers that draw noise or
    carry more than the state.
    """
    chosen = Heun() if solver is None else solver
    if chosen.stochastic:
        raise InputError(f"{type(chosen).__name__} draws noise: a flow needs a deterministic solver")
    spaced = grid_named(grid) if isinstance(grid, str) else grid
    times = spaced(denoiser.process, steps, max(start, stop), min(start, stop))
    times = times if start > stop else times.flip(0)
    ctx = Context.of(len(x), None, cond=dict(cond or {}), dtype=x.dtype, device=x.device)
    if chosen.init(x, float(times[0]), denoiser, ctx).carry is not None:
        raise InputError(f"{type(chosen).__name__} carries more than the state: use a one-step solver")
    d = x[0].numel()
    jacobian = torch.eye(d, dtype=x.dtype, device=x.device).expand(len(x), d, d)
    values = [x.new_ones(len(x), d)]
    for t, s in zip(times.tolist(), times.tolist()[1:], strict=False):

        def step(y: Tensor, t: float = t, s: float = s) -> Tensor:
            return chosen.step(Step(y, t), s, denoiser, ctx).x  # type: ignore[return-value]

        x, local = _differentiated(step, x)
        jacobian = local @ jacobian
        values.append(torch.linalg.svdvals(jacobian))
    return Flow(x, jacobian, times, torch.stack(values))


def flow_log_density(
    denoiser: Denoiser, x: Tensor, *, t: float = 1e-3, steps: int = 100, solver: Solver | None = None,
    grid: Grid | str = "logsnr", base: Callable[[Tensor], Tensor] | None = None, cond: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """log p_t(x) in nats, (B,), of the density that the flow makes of the noise: log p_1(x_1) + log |det dx_1 / dx|.

    base  log density (B, *) -> (B,) of the noise; default: the prior N(0, sigma_1^2), which leaves out what is left of the data

    The determinant is that of :func:`flow_jacobian`, so the density is exactly the sampler's own, of any order and with any
    gauge (``evaluation.likelihood.log_likelihood`` integrates the divergence instead, for many dimensions).
    """
    flow = flow_jacobian(denoiser, x, steps=steps, start=t, stop=1.0, solver=solver, grid=grid, cond=cond)
    sigma = denoiser.process.coef(1.0).sigma
    each = -0.5 * (flow.x / sigma).flatten(1).square() - math.log(sigma) - 0.5 * math.log(2 * math.pi)
    return (each.sum(1) if base is None else base(flow.x)) + torch.linalg.slogdet(flow.jacobian).logabsdet


def largest_gap(singular_values: Tensor) -> Tensor:
    """k (B,) where log s_k - log s_(k + 1) is largest, for falling positive values (B, d): between 1 and d - 1."""
    logs = singular_values.clamp(min=torch.finfo(singular_values.dtype).tiny).log()
    return (logs[:, :-1] - logs[:, 1:]).argmax(1) + 1


def intrinsic_dimension(
    denoiser: Denoiser, x: Tensor, *, t: float = 1e-3, steps: int = 100, solver: Solver | None = None,
    grid: Grid | str = "quadratic", cond: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Flow]:  # fmt: skip
    """The local dimension of the data around x (B, *), (B,), and the flow that shows it.

    x is taken as the state at the small time ``t``, encoded to noise by the probability flow, and carried back with the
    Jacobian Y. Singular values of Y along the data's manifold saturate, those across it fall with sigma(t): the dimension
    is where the gap of their logarithms is largest, at least 1 and at most d - 1. A gauge in the field shears the flow and
    moves that gap, though samples and densities stay exact.
    Source: Horvat & Pfister, 2024, "On gauge freedom, conservativity and intrinsic dimensionality estimation ...".
    """
    chosen = Heun() if solver is None else solver
    times = grid_named(grid) if isinstance(grid, str) else grid
    code = sample(denoiser, chosen, times, steps, x=x, start=t, stop=1.0, cond=cond)
    flow = flow_jacobian(denoiser, code, steps=steps, stop=t, solver=chosen, grid=times, cond=cond)
    return largest_gap(flow.singular_values[-1]), flow


def local_pca_dimension(x: Tensor, data: Tensor, *, neighbours: int = 20) -> Tensor:
    """The largest gap of the principal standard deviations of the nearest data (N, d) to each x (B, d), (B,).

    Source: Fukunaga & Olsen, 1971, "An Algorithm for Finding Intrinsic Dimensionality of Data".
    """
    _neighbours(neighbours, data, 3)
    near = data.double()[torch.cdist(x.double(), data.double()).topk(neighbours, largest=False).indices]
    return largest_gap(torch.linalg.svdvals(near - near.mean(1, keepdim=True)))


def maximum_likelihood_dimension(x: Tensor, data: Tensor, *, neighbours: int = 20) -> Tensor:
    """(k - 2) / sum_(j < k) log(T_k / T_j) with the distances T to the k nearest data (N, d) of each x, (B,).

    Points at distance 0 from x are left out. Source: Levina & Bickel, 2004, "Maximum Likelihood Estimation of Intrinsic
    Dimension"; MacKay & Ghahramani, 2005 (k - 2 makes the mean of its inverse unbiased).
    """
    _neighbours(neighbours, data, 3)
    distance = torch.cdist(x.double(), data.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.masked_fill(distance == 0, math.inf).topk(neighbours, largest=False).values
    return (neighbours - 2) / (nearest[:, -1:] / nearest[:, :-1]).log().sum(1)


def moved_picture(
    picture: Tensor,
    n: int,
    *,
    turned: bool = True,
    shift: float = 0.25,
    size: int = 16,
    components: int = 12,
    seed: int = 0,
) -> Tensor:
    """n views of one picture (H, W) whose intrinsic dimension is known: (n, components), of unit variance over all.

    turned  by any angle, one dimension        shift  by up to this share of half the width each way, two dimensions

    Each view is sampled at size x size points, and the views are projected on their leading principal components. The
    dimension is right for pictures without symmetries. Raises InputError for views that do not move.
    """
    if picture.ndim != 2 or not (turned or shift > 0) or n <= components:
        raise InputError(
            f"{n} views of {tuple(picture.shape)} with turned = {turned}, shift = {shift}: nothing moves, or too few"
        )
    rng = torch.Generator().manual_seed(seed)
    u = torch.rand(3, n, generator=rng)
    angle, (dx, dy) = 2 * math.pi * u[0] * turned, shift * (2 * u[1:] - 1)
    rows = [torch.stack(r, 1) for r in ((angle.cos(), -angle.sin(), dx), (angle.sin(), angle.cos(), dy))]
    grid = F.affine_grid(1.4 * torch.stack(rows, 1), [n, 1, size, size], align_corners=False)
    views = F.grid_sample(picture.expand(n, 1, *picture.shape), grid, align_corners=False).flatten(1)
    views = views - views.mean(0)
    parts = views @ torch.linalg.svd(views, full_matrices=False).Vh[:components].T
    return parts / parts.std()


def _neighbours(count: int, data: Tensor, least: int) -> None:
    """InputError unless there are so many neighbours in data (N, d)."""
    if data.ndim != 2 or not least <= count < len(data):
        raise InputError(f"{count} neighbours in data {tuple(data.shape)}: (N, d), and {least} to N - 1 of them")


def _score(denoiser: Denoiser, x: Tensor, t: float | Tensor, cond: Mapping[str, Any] | None) -> Tensor:
    """The score at x, (B, *)."""
    ctx = Context.of(len(x), None, cond=dict(cond or {}), dtype=x.dtype, device=x.device)
    return denoiser(x, clocks(t, x) if isinstance(t, Tensor) else t, ctx).view("score")  # type: ignore[no-any-return]


def _differentiated(fn: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(fn(x), its Jacobian (B, d, d)) for a map of rows that do not act on each other."""
    with torch.enable_grad():
        y = x.detach().requires_grad_(True)
        out = fn(y)
        flat = out.flatten(1)
        rows = [
            torch.autograd.grad(flat[:, i].sum(), y, retain_graph=True, materialize_grads=True)[0].flatten(1)
            for i in range(flat.shape[1])
        ]
    return out.detach(), torch.stack(rows, 1)
