"""The gradient of the probability flow, by its adjoint equation solved backwards in coordinates where it is not stiff."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Coef, InputError, Posterior, Step, linear
from sfumato.gradients._job import Gradients, Job, Pull
from sfumato.gradients._registry import register
from sfumato.gradients._trees import leaves
from sfumato.processes import Gaussian


@dataclass(frozen=True)
class Coordinate:
    """z = x / scale moves by dz/dvariable = p x0 + q eps, with (p, q) = row."""

    scale: Callable[[Coef], float]
    variable: Callable[[Coef, float], float]
    row: Callable[[Coef], tuple[float, float]]


COORDINATES = {
    "angle": Coordinate(
        lambda c: math.hypot(c.alpha, c.sigma),
        lambda c, t: c.angle,
        lambda c: (-c.sigma / math.hypot(c.alpha, c.sigma), c.alpha / math.hypot(c.alpha, c.sigma)),
    ),
    "rho": Coordinate(lambda c: c.alpha, lambda c, t: c.sigma / c.alpha, lambda c: (0.0, 1.0)),
    "t": Coordinate(lambda c: 1.0, lambda c, t: t, lambda c: (c.dalpha, c.dsigma)),
}


@register("adjoint")
@dataclass(frozen=True)
class Adjoint:
    """Adjoint sensitivity: with z = x / scale, dz/du = F and a = dL/dz,

        da/du = -a dF/dz,    dL/dw = -int a dF/dw du    (w: parameters and conditions),

    solved from the end of the run to its start on the run's own times, with one graph of one denoiser call at a time.

    variable  u and z: 'angle'  atan2(sigma, alpha) and x / hypot(alpha, sigma), where F is the normalised v: finite at
                                both ends and the default
                       'rho'    sigma / alpha and x / alpha, where F is eps: the published one; not where alpha = 0
                       't'      t and x, where F is the flow: stiff near the data
    order     1: Euler's method, one product with the Jacobian a call, as published; 2: Heun's method; 3, 4: Adams-Moulton
              in u, predicted by Adams-Bashforth of one order less, which loses nothing and extrapolates less where steps
              grow; one call and two products a step
    store     keep the states of the run (one latent a step, small beside the activations of a call). False: solve them
              backwards as well from the last two, in memory that does not depend on the number of steps; a contracting
              flow is unstable that way, so this needs small steps

    It is the gradient of the flow, not of the discrete run: it converges to it with order min(order, solver.order). The
    last step of a run that ends at sigma = 0 is differentiated as the DDIM step that it is. Wrappers that remember are
    asked anew at every call. Raises InputError for solvers that draw noise, processes that are not Gaussian, a clock an
    item, and a denoiser through which no gradients flow (a detach or no_grad inside).

    Source: Pan, Liew, Tan, Feng, Yan, 2024, "AdjointDPM: Adjoint Sensitivity Method for Gradient Backpropagation of
    Diffusion Probabilistic Models"; Chen, Rubanova, Bettencourt, Duvenaud, 2018, "Neural Ordinary Differential Equations".
    """

    order: int = 2
    variable: str = "angle"
    store: bool = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4) or self.variable not in COORDINATES:
            raise InputError(
                f"order = {self.order!r}, variable = {self.variable!r}: an order of 1 to 4, and one of {', '.join(COORDINATES)}"
            )

    def record(self, job: Job, start: Step) -> tuple[Step, Pull]:
        """Run, keep the states or the last two, and say how gradients come back."""
        _check(job, start)
        count = len(leaves((start.x, start.carry, job.ctx.memory)))
        states: list[tuple[float, Tensor]] = []
        for st in job.forward(start):
            states.append((st.t, job.solver.read(st)))  # type: ignore[arg-type]
            last = st
            if not self.store:
                states = states[-2:]
        times = [start.t, *job.seen[start.index :]]
        return last, lambda given: Backward(self, job, times, states, count).pull(given)  # type: ignore[arg-type]


class Call:
    """One denoiser call with its graph: readings and their products with the Jacobian."""

    def __init__(self, job: Job, x: Tensor, t: float, index: int, grad: bool = True) -> None:
        self.job, self.ctx = job, job.context({}, index, t)
        self.ctx.rng = None  # the flow has no noise
        self.x = x.detach().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            self.post: Posterior = job.denoiser(self.x, t, self.ctx)
        if grad and not self.post.native.requires_grad:
            raise InputError(
                "the denoiser's belief does not depend on its input as far as autograd can see (a detach or no_grad "
                "inside): no adjoint can be solved through it"
            )

    def reading(self, row: tuple[float, float]) -> Tensor:
        return self.post.at(*row)

    def pull(self, row: tuple[float, float], a: Tensor, *, state: bool = True, wanted: bool, last: bool) -> Gradients:
        """a d(reading)/d(x, wanted). ``last``: the graph is not needed any more."""
        inputs = [*([self.x] if state else []), *(self.job.wanted if wanted else [])]
        with torch.enable_grad():
            read = self.reading(row)
        self.job.check([read], [self.x])
        if not inputs:
            return [None]
        found = torch.autograd.grad(read, inputs, a, allow_unused=True, retain_graph=not last)
        return [*([] if state else [None]), *found]


class Backward:
    """The adjoint equation along one run; nodes count from the end of the run to its start."""

    def __init__(
        self,
        rule: Adjoint,
        job: Job,
        times: Sequence[float],
        states: Sequence[tuple[float, Tensor]],
        leaves_of_start: int,
    ) -> None:
        process, place = job.denoiser.process, COORDINATES[rule.variable]
        self.rule, self.job, self.place = rule, job, place
        self.times = list(reversed(times))
        self.states = [x for _, x in reversed(states)]
        self.coefs = [process.coef(t) for t in self.times]
        self.jump = self.coefs[0].sigma == 0 and len(times) > 1 and times[0] > times[-1]
        self.first = int(self.jump)
        self.scales = [0.0] * self.first + [place.scale(c) for c in self.coefs[self.first :]]
        if not all(self.scales[self.first :]):
            raise InputError(f"variable = {rule.variable!r} is infinite where alpha = 0: use variable='angle'")
        self.nodes = [
            math.nan if i < self.first else place.variable(c, t)
            for i, (c, t) in enumerate(zip(self.coefs, self.times, strict=True))
        ]
        self.sums: Gradients = [None] * len(job.wanted)
        self.leaves = leaves_of_start

    def pull(self, given: Sequence[Tensor | None]) -> Gradients:
        """Gradients of the start's leaves and of ``job.wanted`` from that of the last state."""
        (a,) = given
        assert a is not None  # autograd materialises zeros
        top, j = len(self.nodes) - 1, self.first
        shares = self._shares()
        call = self._call(j, self.states[j])
        if self.jump:
            c = self.coefs[0]
            found = call.pull((c.alpha, 0.0), a, wanted=True, last=j == top)
            self._add(found[1:], 1.0)
            a = found[0]
        a = linear(self.scales[j], a)
        slopes: list[Tensor] = []  # a dF/dz at the nodes, newest first
        fields: list[Tensor] = []
        z = linear(1 / self.scales[j], self.states[j])
        while j < top:
            slopes = [self._slope(call, j, a, shares[j]), *slopes][: self.rule.order]
            if not self.rule.store:
                fields = [call.reading(self.place.row(self.coefs[j])).detach(), *fields][: self.rule.order]
                z = self._state(z, fields, j)
            j += 1
            call = self._call(j, self.states[j] if self.rule.store else linear(self.scales[j], z))
            a = self._advance(a, slopes, j, call)
        if shares[top]:
            self._slope(call, top, a, shares[top], state=False)
        start = linear(1 / self.scales[top], a)
        return [start, *[None] * (self.leaves - 1), *self.sums]

    def _advance(self, a: Tensor, slopes: list[Tensor], j: int, call: Call) -> Tensor:
        """a at node j: predicted from the slopes before, then corrected with the slope there."""
        ahead = self._ahead(a, -1.0, slopes, j)
        if self.rule.order == 1:
            return ahead
        there = self._slope(call, j, ahead, 0.0)
        known = [there, *slopes][: self.rule.order]
        return self._moved(a, -1.0, self._weights(j, self._nodes(j, len(known))), known)

    def _ahead(self, z: Tensor, sign: float, slopes: list[Tensor], j: int) -> Tensor:
        """z at node j from the slopes before it, through one node less than the corrector has."""
        known = slopes[: max(self.rule.order - 1, 1)]
        return self._moved(z, sign, self._weights(j, self._nodes(j - 1, len(known))), known)

    def _state(self, z: Tensor, fields: list[Tensor], j: int) -> Tensor:
        """z at node j + 1 by the same method as a."""
        ahead = self._ahead(z, 1.0, fields, j + 1)
        if self.rule.order == 1:
            return ahead
        call = self._call(j + 1, linear(self.scales[j + 1], ahead), grad=False)
        known = [call.reading(self.place.row(self.coefs[j + 1])), *fields][: self.rule.order]
        return self._moved(z, 1.0, self._weights(j + 1, self._nodes(j + 1, len(known))), known)

    def _call(self, j: int, x: Tensor, grad: bool = True) -> Call:
        return Call(self.job, x, self.times[j], len(self.times) - 1 - j, grad)

    def _slope(self, call: Call, j: int, a: Tensor, share: float, state: bool = True) -> Any:
        """a dF/dz at node j; with its share of the integral the parameters get theirs, and the graph is done with."""
        found = call.pull(self.place.row(self.coefs[j]), a, state=state, wanted=share != 0, last=share != 0)
        self._add(found[1:], -share)
        return linear(self.scales[j], found[0]) if state else None

    def _add(self, found: Gradients, share: float) -> None:
        for i, g in enumerate(found):
            if g is not None:
                before = self.sums[i]
                self.sums[i] = g.mul(share) if before is None else before.add_(g, alpha=share)

    @staticmethod
    def _nodes(newest: int, count: int) -> range:
        return range(newest, newest - count, -1)

    def _weights(self, j: int, nodes: Sequence[int]) -> list[float]:
        """Those of the integral from node j - 1 to node j of the polynomial through these nodes."""
        return lagrange(self.nodes[j - 1], self.nodes[j], [self.nodes[i] for i in nodes])

    @staticmethod
    def _moved(z: Tensor, sign: float, weights: list[float], slopes: list[Tensor]) -> Tensor:
        terms = [v for w, slope in zip(weights, slopes, strict=True) for v in (sign * w, slope)]
        moved: Tensor = linear(1.0, z, *terms)
        return moved

    def _shares(self) -> list[float]:
        """The weight of each node in the integral over the whole run, by the corrector's polynomials."""
        shares = [0.0] * len(self.nodes)
        for j in range(self.first + 1, len(self.nodes)):
            newest = j - 1 if self.rule.order == 1 else j
            nodes = self._nodes(newest, min(self.rule.order, newest - self.first + 1))
            for i, w in zip(nodes, self._weights(j, nodes), strict=True):
                shares[i] += w
        return shares


_GAUSS = ((-math.sqrt(0.6), 5 / 9), (0.0, 8 / 9), (math.sqrt(0.6), 5 / 9))


def lagrange(a: float, b: float, nodes: Sequence[float]) -> list[float]:
    """Weights w_j with int_a^b p = sum_j w_j p(nodes_j) for every polynomial p of degree < len(nodes) <= 6."""
    places = [((a + b + (b - a) * g) / 2, w * (b - a) / 2) for g, w in _GAUSS]
    return [math.fsum(w * math.prod((y - m) / (n - m) for m in nodes if m != n) for y, w in places) for n in nodes]


def _check(job: Job, start: Step) -> None:
    if job.solver.stochastic:
        raise InputError(
            f"{type(job.solver).__name__} draws noise and the adjoint is that of the probability flow: use a deterministic "
            "solver, or method='checkpoint'"
        )
    if not isinstance(job.denoiser.process, Gaussian):
        raise InputError(
            f"the adjoint needs a Gaussian process, not {type(job.denoiser.process).__name__}: use method='checkpoint'"
        )
    if not isinstance(start.t, float):
        raise InputError("the adjoint needs one clock for the batch: use method='checkpoint'")
