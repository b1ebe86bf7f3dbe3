"""Edits by recorded noise: the source explains the picture by the noise that draws it, the target draws with that noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sfumato.core import Denoiser, InputError, Solver
from sfumato.editing.base import Method, Task, register
from sfumato.editing.methods.basic import check_strength
from sfumato.editing.recorded import NoiseMaps, record
from sfumato.solvers.ancestral import DDIM, Ancestral


@dataclass(frozen=True)
class Recorded(Method):
    """Base: record with the source's conditions from t = strength on, decode with the target's."""

    strength: float = 1.0
    eta: float = 1.0
    source_guidance: float | None = None
    keep_last: bool = True

    path: ClassVar[str]

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if not 0 < self.eta <= 1:
            raise InputError(f"eta = {self.eta}: above 0 (DDIM, which has no noise to record) and at most 1")

    def encoder(self, task: Task) -> Denoiser:
        """The denoiser that explains the picture."""
        return task.scaled(self.source_guidance)

    def maps(self, task: Task) -> NoiseMaps:
        """The recorded noise of the task's pictures."""
        ctx = task.context(task.source)
        found = record(
            self.encoder(task), task.x0, solver=drawing(task.solver, self.eta), grid=task.grid, path=self.path,
            steps=max(1, round(task.steps * self.strength)), start=self.strength, ctx=ctx,
        )  # fmt: skip
        task.nfe[0] += ctx.run.nfe
        return found

    def __call__(self, task: Task) -> Tensor:
        found, ctx = self.maps(task), task.context()
        x = found.decode(task.guided, ctx=ctx, keep_last=self.keep_last)
        task.nfe[0] += ctx.run.nfe
        return x


@register("edit-friendly")
@dataclass(frozen=True)
class EditFriendly(Recorded):
    """Noise maps recorded along states that are drawn independently at every time: they hold the structure of the picture.

    strength         1 - skipped share of the run (published: 36 of 100 steps skipped)
    eta              share of DDPM's noise; with solver= any other that draws once a step
    source_guidance  scale while recording; None: the target's
    keep_last        also keep what the last step, which draws no noise, misses: exact with target = source

    Source: Huberman-Spiegelglas, Kulikov, Michaeli, 2024, "An Edit Friendly DDPM Noise Space: Inversion and
    Manipulations".
    """

    strength: float = 0.64
    source_guidance: float | None = 3.5

    path: ClassVar[str] = "independent"


@register("cycle-diffusion")
@dataclass(frozen=True)
class CycleDiffusion(Recorded):
    """Noise maps recorded along the true chain q(x_s | x_t, x0), standard normal as those of any drawn picture.

    strength         1 - skipped share of the run (published: 15 to 50 of 99 steps skipped)
    eta              share of DDPM's noise (published: 0.1)
    source_guidance  scale while recording
    keep_last        also keep what the last step, which draws no noise, misses: exact with target = source
    model            the denoiser of another domain that records, told the source's conditions; None: the one that draws

    Source: Wu, De la Torre, 2023, "Unifying Diffusion Models' Latent Space, with Applications to CycleDiffusion and
    Guidance".
    """

    strength: float = 0.7
    eta: float = 0.1
    source_guidance: float | None = 1.0
    model: Denoiser | None = None

    path: ClassVar[str] = "posterior"

    def encoder(self, task: Task) -> Denoiser:
        return super().encoder(task if self.model is None else task.but(denoiser=self.model))


def drawing(solver: Solver, eta: float) -> Solver:
    """A solver that draws: DDPM with this eta in the place of DDIM, any stochastic one as it is."""
    if isinstance(solver, DDIM):
        return Ancestral(eta)
    if not solver.stochastic:
        raise InputError(
            f"{solver} draws no noise, so there is none to record: leave solver= out, or give one that draws, "
            "e.g. 'dpm-solver++(order=2, eta=1.0)'"
        )
    return solver


__all__ = ["CycleDiffusion", "EditFriendly", "Recorded", "drawing"]
