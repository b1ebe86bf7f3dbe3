"""What an edit is asked (Task), what performs it (Method), and the methods by name: the slugs of the papers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sfumato import codecs, core
from sfumato.core import Context, Denoiser, Grid, Guidance, InputError, Registry, Solver, State, Step, check_steps
from sfumato.guidance import cfg

registry = Registry("edit method", "sfumato.editing.methods")
register = registry.register

INPUTS = {
    "prompt": "what the result shows: prompt= or cond=",
    "source": "what the image shows: source= or source_cond=",
    "mask": "where it may change: mask=, white or 1 inside",
    "points": "what moves where: points=[(from x, from y, to x, to y), ...] in pixels",
    "reference": "a second image: reference=",
    "direction": "what was learned: direction=, an object or a file of `sfumato directions`",
}


@dataclass(frozen=True)
class Task:
    """One edit of B images, in the space of the process.

    denoiser      without guidance
    codec         images to that space and back
    x0            (B, *) the encoded images; images: the originals, uint8 (B, 3, H, W)
    source        conditions that describe the images (the null ones where nothing was said)
    target        conditions asked for
    guidance      what is put around the denoiser when the target is drawn: Denoiser -> Denoiser
    scale         its scale where it is classifier-free, else None
    solver, grid  objects; steps: of a whole run from t = 1 to 0
    mask          (B, 1, H, W) float in [0, 1], 1 where the image may change, in pixels; ``latent_mask`` fits x0
    points        (from x, from y, to x, to y) in pixels
    reference     (B, *) a second image, encoded
    direction     what was learned for the method (Boundaries, a Direction)
    seed          item i draws from stream (seed, i)
    given         which of INPUTS the caller gave
    nfe           [calls an image], added up over the runs of the edit
    """

    denoiser: Denoiser
    codec: codecs.Codec
    x0: Tensor
    images: Tensor
    source: Mapping[str, Any]
    target: Mapping[str, Any]
    guidance: Guidance
    scale: float | None
    solver: Solver
    grid: Grid
    steps: int
    mask: Tensor | None = None
    points: tuple[tuple[float, float, float, float], ...] = ()
    reference: Tensor | None = None
    direction: Any = None
    seed: int = 0
    given: frozenset[str] = frozenset()
    nfe: list[float] = field(default_factory=lambda: [0.0])

    def __post_init__(self) -> None:
        check_steps(self.steps)

    @property
    def process(self) -> Any:
        """The noising law."""
        return self.denoiser.process

    @property
    def guided(self) -> Denoiser:
        """The denoiser that draws the target."""
        return self.guidance(self.denoiser)

    def scaled(self, scale: float | None) -> Denoiser:
        """The denoiser under classifier-free guidance of this scale; None is the target's own guidance."""
        return self.guided if scale is None else self.denoiser if scale == 1 else cfg(scale)(self.denoiser)

    @property
    def latent_mask(self) -> Tensor | None:
        """The mask at the resolution of x0: the share of each cell that may change."""
        if self.mask is None:
            return None
        from torch.nn.functional import interpolate

        return interpolate(self.mask, size=self.x0.shape[-2:], mode="area").to(self.x0)

    def context(self, cond: Mapping[str, Any] | None = None, **fields: Any) -> Context:
        """A context for the batch: this edit's streams, the target's conditions unless others are given."""
        cond = dict(self.target if cond is None else cond)
        return Context.of(len(self.x0), self.seed, cond=cond, dtype=self.x0.dtype, device=self.x0.device, **fields)

    def trajectory(
        self,
        x: State | Step,
        *,
        denoiser: Denoiser | None = None,
        solver: Solver | None = None,
        cond: Mapping[str, Any] | None = None,
        start: float = 1.0,
        stop: float = 0.0,
        steps: int | None = None,
        ctx: Context | None = None,
        grad: bool = False,
    ) -> Iterator[Step]:
        """The sampling loop with this edit's solver, grid and number of steps (in proportion to |start - stop|).

        denoiser  the guided one for the target's conditions, or another; start < stop inverts
        The calls it makes are added to ``nfe``.
        """
        ctx = self.context(cond) if ctx is None else ctx
        steps = max(1, round(self.steps * abs(start - stop))) if steps is None else steps
        before = ctx.run.nfe
        for st in core.trajectory(
            self.guided if denoiser is None else denoiser, solver or self.solver, self.grid, steps,
            x=x, start=start, stop=stop, ctx=ctx, grad=grad,
        ):  # fmt: skip
            self.nfe[0] += ctx.run.nfe - before
            before = ctx.run.nfe
            yield st

    def run(self, x: State | Step, **options: Any) -> Step:
        """The last Step of :meth:`trajectory`."""
        for st in self.trajectory(x, **options):
            last = st
        return last

    def but(self, **fields: Any) -> Task:
        """This task with other fields; calls go on being counted together."""
        return replace(self, **fields)


class Method:
    """A frozen recipe of numbers: ``method(task) -> x0`` edited, (B, *) in the space of the process.

    needs    the inputs (names in INPUTS) without which it says nothing; the front door asks for them
    accepts  the inputs it can use beside those; one that is given and unknown to it is refused
    """

    needs: frozenset[str] = frozenset({"prompt"})
    accepts: frozenset[str] = frozenset({"source"})

    def __call__(self, task: Task) -> State:
        raise NotImplementedError(f"{type(self).__name__} must say how it edits: write __call__(task)")

    def check(self, name: str, given: frozenset[str]) -> None:
        """InputError where something needed is missing or something given would be ignored."""
        for key in sorted(self.needs - given):
            raise InputError(f"{name} needs {INPUTS[key]}")
        for key in sorted(given - self.needs - self.accepts):
            raise InputError(f"{name} does not use {key}=: it takes {', '.join(sorted(self.needs | self.accepts))}")


def get(name: str, /, **numbers: Any) -> Method:
    """The named method with these numbers."""
    return registry.get(name, **numbers)  # type: ignore[no-any-return]


def names() -> list[str]:
    """All registered methods."""
    return registry.names()


__all__ = ["INPUTS", "Method", "Task", "get", "names", "register", "registry"]
