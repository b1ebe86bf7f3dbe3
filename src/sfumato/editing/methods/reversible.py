"""Edits by a solver with an inverse: exactly up under the source's conditions, down under the target's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sfumato.core import InputError, Solver, Step
from sfumato.editing.base import Method, Task, register
from sfumato.editing.methods.basic import check_strength
from sfumato.solvers.ancestral import DDIM
from sfumato.solvers.bidirectional import Bidirectional
from sfumato.solvers.implicit import Implicit
from sfumato.solvers.reversible import BDIA, EDICT

LOST = 1000.0  # roundings that BDIA may lose on the way up


def inverted(task: Task, solver: Solver, strength: float, guidance: float | None) -> Step:
    """The Step at t = strength from which ``solver``, under the same conditions and guidance, comes back to x0.

    guidance  a classifier-free scale for the way up; None: the target's own
    """
    up = task.run(
        task.x0, denoiser=task.scaled(guidance), solver=solver.inverse(), cond=task.source, start=0.0, stop=strength
    )
    return up.restart()


@dataclass(frozen=True)
class Reversible(Method):
    """Base: up by the inverse of ``exact(task.solver, steps)`` to t = strength, down by that solver itself."""

    strength: float = 0.8
    source_guidance: float | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def exact(self, solver: Solver, steps: int) -> Solver:
        """The solver with an inverse that takes the place of the one asked for, in a run of so many steps."""
        raise NotImplementedError(f"{type(self).__name__} must name its solver: write exact(solver, steps)")

    def __call__(self, task: Task) -> Tensor:
        solver = self.exact(task.solver, max(1, round(task.steps * self.strength)))
        top = inverted(task, solver, self.strength, self.source_guidance)
        return solver.read(task.run(top, solver=solver, start=self.strength))  # type: ignore[return-value]


@register("edict")
@dataclass(frozen=True)
class EDICTEdit(Reversible):
    """Two coupled DDIM runs up under the source and down under the target, two calls a step; see the solver 'edict'.

    strength         share of the noise that is added
    mixing, form     of the solver; below 1 the two runs stay together
    source_guidance  scale on the way up; None: the target's, as published (edits of emoji come out worse with it)

    With target = source and one guidance it returns the picture: to 1e-12 in float64, 1e-4 in float32. Source: Wallace, Gokul, Naik, 2023,
    "EDICT: Exact Diffusion Inversion via Coupled Transformations".
    """

    source_guidance: float | None = 1.0
    mixing: float = 0.93
    form: str = "v"

    def exact(self, solver: Solver, steps: int) -> Solver:
        if isinstance(solver, EDICT):
            return solver
        if not isinstance(solver, DDIM):
            raise InputError(
                f"edict couples two runs of DDIM, not of {solver}: leave solver= out, or use method='bdia'"
            )
        return EDICT(self.mixing, self.form)


@register("bdia")
@dataclass(frozen=True)
class BDIAEdit(Reversible):
    """Bidirectional integration up under the source and down under the target, one call a step; see the solver 'bdia'.

    strength         share of the noise that is added
    gamma            how much of the state before is kept: what differs between odd and even steps, which a change of conditions
                     excites, is damped by it on the way down, and rounding magnified on the way up; None: 1000^(-1 / steps)
    source_guidance  scale on the way up; None: the target's

    With another solver than DDIM (solver="heun", any deterministic singlestep) that one is made exactly invertible.
    Source: Zhang, Lewis, Kleijn, 2024, "Exact Diffusion Inversion via Bi-directional Integration Approximation".
    """

    strength: float = 0.8
    source_guidance: float | None = 1.0
    gamma: float | None = None

    def exact(self, solver: Solver, steps: int) -> Solver:
        if isinstance(solver, (BDIA, Bidirectional)):
            return solver
        gamma = LOST ** (-1 / steps) if self.gamma is None else self.gamma
        return BDIA(gamma) if isinstance(solver, DDIM) else Bidirectional(solver, gamma)


@register("fixed-point")
@dataclass(frozen=True)
class FixedPoint(Reversible):
    """The solver's own inverse by fixed-point iteration, up under the source and down under the target.

    strength         share of the noise that is added
    iterations       a step on the way up, each one call of the solver
    source_guidance  scale on the way up: 1 is what converges, None the target's

    Any deterministic singlestep solver will do. An inverse to a tolerance, or an error where there is none, is
    solver="implicit", whose numbers are kept. Source: Pan, Gherardi, Xie, Huang, 2023, "Effective Real Image Editing with
    Accelerated Iterative Diffusion Inversion".
    """

    strength: float = 0.8
    source_guidance: float | None = 1.0
    iterations: int = 5

    def exact(self, solver: Solver, steps: int) -> Solver:
        return solver if isinstance(solver, Implicit) else Implicit(solver, self.iterations, strict=False)


__all__ = ["BDIAEdit", "EDICTEdit", "FixedPoint", "Reversible", "inverted"]
