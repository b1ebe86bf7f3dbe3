"""Editing by one step across a semantic hyperplane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfumato.core import InputError, linear
from sfumato.denoisers.features import features
from sfumato.editing.base import Method, Task, register
from sfumato.editing.boundary import Boundaries, LinearBoundary
from sfumato.guidance.internal import internal

WHERE = ("both", "x", "h")


@register("boundary-diffusion")
@dataclass(frozen=True)
class BoundaryDiffusion(Method):
    """Invert to the critical time, move x and h to a given side of the class boundary, and sample down.

        x' = x + (d - distance(x)) n_x,    h' = h + (d - distance(h)) n_h

    h' takes the place of the bottleneck's output in the first step down, and only there; afterwards nothing guides.

    boundaries  of the attribute: :meth:`sfumato.editing.boundary.Boundaries.fit`; or give the edit a direction= that
                `sfumato directions` learned
    distance    d in units of each boundary's ``spread``: 0 is the boundary itself, negative the other class. None moves
                nothing: the plain inversion and back
    where       'both', only 'x' or only 'h'
    relative    distance is added to where an item is instead of being where it goes

    Without guidance. Published distances are absolute and measured from a parallel plane through the origin: the same moves,
    otherwise numbered. Source: Zhu, Wu, Deng, Russakovsky, Yan, 2023, "Boundary Guided Learning-Free Semantic Control with
    Diffusion Models".
    """

    boundaries: Boundaries | None = None
    distance: float | None = 2.0
    where: str = "both"
    relative: bool = False

    needs = frozenset()
    accepts = frozenset({"source", "direction"})

    def __post_init__(self) -> None:
        if self.where not in WHERE:
            raise InputError(f"where = {self.where!r}: one of {', '.join(WHERE)}")

    def __call__(self, task: Task) -> Tensor:
        at = self.boundaries or task.direction
        if not isinstance(at, Boundaries):
            raise InputError(
                "the attribute is learned from examples: give direction=, a file of `sfumato directions` for "
                "boundary-diffusion, or boundaries=Boundaries.fit(denoiser, x0, labels, time)"
            )
        plain: dict[str, Any] = {"denoiser": task.denoiser, "cond": task.source}
        x: Any = task.run(task.x0, start=0.0, stop=at.time, **plain).x
        if self.distance is not None and self.where != "x":
            ctx = task.context(task.source)
            there = self._moved(at.h, features(task.denoiser, x, at.time, ctx, [at.path])[1][at.path])
            task.nfe[0] += ctx.run.nfe
            # the interval holds the first time of the way down and no other
            plain["denoiser"] = internal(lambda h, t: there, at.path, interval=(at.time, 1.0))(task.denoiser)
        if self.distance is not None and self.where != "h":
            x = self._moved(at.x, x)
        return task.solver.read(task.run(x, start=at.time, **plain))  # type: ignore[return-value]

    def _moved(self, boundary: LinearBoundary, latent: Tensor) -> Tensor:
        """The latent at the wanted distance from the hyperplane, or that far from where it was."""
        goal = (self.distance or 0.0) * boundary.spread
        if self.relative:
            return linear(1.0, latent, goal, boundary.normal.expand_as(latent))  # type: ignore[no-any-return]
        return boundary.moved(latent, goal)
