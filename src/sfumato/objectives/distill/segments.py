"""Learn a teacher's moves between given times in one step each: reflow, rectified pairs, phases, progressive distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import solvers
from sfumato.core import Context, Denoiser, Frozen, InputError, Loss, Objective, Posterior, Solver, linear, solve
from sfumato.objectives.denoising import drop
from sfumato.objectives.distill._common import distance, falling, moved, one_of, readable, streams
from sfumato.objectives.times import unit
from sfumato.objectives.weights import Weighting, weight


def matched(process: Any, x: Tensor, t: Any, y: Tensor, s: Any) -> tuple[Tensor, Tensor]:
    """The pair (x0, eps) of the segment from (x, t) to (y, s): x = alpha_t x0 + sigma_t eps and y = alpha_s x0 + sigma_s eps.

    A denoiser that believes it all along x_u = alpha_u x0 + sigma_u eps takes the segment in one DDIM step, whatever the
    process. For t = 1 and s = 0 it is the matched noise and sample of reflow. In terms of n = sigma / alpha,
    eps = (y / alpha_s - x / alpha_t) / (n_s - n_t). Raises InputError where the two times are one.
    """
    a, b = process.coef(t), process.coef(s)
    rows = (a.alpha, a.sigma), (b.alpha, b.sigma)
    (u, w), (p, q) = solve((1.0, 0.0), *rows), solve((0.0, 1.0), *rows)
    return linear(u, x, w, y), linear(p, x, q, y)


class Segments(Objective):
    """min E |student's end of the segment - teacher's end|^2 over the segments between neighbouring ``times``.

    A segment leads the teacher from x at t_k to y at t_{k+1}; its matched pair (see :func:`matched`) gives the states
    x_t on the way and what the student should predict there.

    student   player 'student'
    times     t_0 > ... > t_K: K segments, each item draws one
    teacher   None: batch["states"] (B, K + 1, *) holds the teacher's states at these times, one trajectory an item.
              A Denoiser (with its guidance around it): batch["x"] is data, noised to t_k, from where the teacher takes
              ``substeps`` steps of ``solver`` (singlestep, deterministic), equal in t
    inside    the share of items whose t is drawn within the segment, in (t_{k+1}, t_k]; the others are at its start
    read      what is compared: 'end' (the student's one step to t_{k+1}), 'native' (its own kind of prediction), or
              'x0' | 'eps' | 'v' | 'flow'
    weighting, numbers   of 'native': see :func:`sfumato.objectives.weights.weight`
    metric    'l2' | 'l1' | 'huber' with ``scale``
    dropout   as in :class:`sfumato.objectives.Denoising`
    looks     a further distance (x0, x0') -> (B,) of what student and pair say is clean, with the weight ``seen``: a
              perceptual one

    A batch is {"states" or "x", "cond"}. Configurations:
    'reflow' stored pairs, K = 1, inside = 1, flow; 'rectified-diffusion' the same in any process, read = 'x0', huber;
    'phased' K phases, inside = 1, 10 substeps, huber; 'progressive' inside = 0, 2 substeps, read 'native' under 'max-snr'.
    Sources: Liu, Gong, Liu, 2023, "Flow Straight and Fast" (reflow); Wang et al., 2024, "Rectified Diffusion: Straightness
    Is Not Your Need in Rectified Flow"; Salimans & Ho, 2022, "Progressive Distillation for Fast Sampling of Diffusion
    Models".
    """

    def __init__(
        self,
        student: Denoiser,
        times: Sequence[float],
        teacher: Denoiser | None = None,
        *,
        solver: str | Solver = "ddim",
        substeps: int = 2,
        inside: float = 0.0,
        read: str = "end",
        weighting: Weighting = "uniform",
        numbers: Mapping[str, float] | None = None,
        metric: str = "l2",
        scale: float = 1e-3,
        dropout: float | Mapping[str, float] = 0.0,
        looks: nn.Module | None = None,
        seen: float = 1.0,
    ) -> None:
        super().__init__()
        self.looks, self.seen = None if looks is None else Frozen(looks), seen
        self.student, self.teacher = student, None if teacher is None else Frozen(teacher)
        self.solver: Solver = solvers.registry.make(solver) if isinstance(solver, str) else solver
        if teacher is not None and self.solver.stochastic:
            raise InputError(f"{type(self.solver).__name__} draws noise: a segment needs a deterministic solver")
        if substeps < 1 or not 0 <= inside <= 1:
            raise InputError(f"substeps = {substeps}, inside = {inside}: at least 1, and a share in [0, 1]")
        if read not in ("end", "native", "x0", "eps", "v", "flow"):
            raise InputError(f"read = {read!r}: use 'end', 'native', 'x0', 'eps', 'v' or 'flow'")
        self._times = falling(times)
        readable(student, self._times[:-1].tolist())
        self.substeps, self.inside, self.read = substeps, inside, read
        self.weighting, self.numbers, self.metric, self.scale = weighting, dict(numbers or {}), metric, scale
        self.dropout = dropout

    def players(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "student") -> Loss:
        process = self.student.process
        segment = one_of(len(self._times) - 1, ctx)
        start, end = self._times[segment], self._times[segment + 1]
        x, y = self._ends(batch, segment, start, end, ctx)
        start, end = start.to(x.device), end.to(x.device)
        x0, noise = matched(process, x, start, y, end)
        t = self._inside(start, end, ctx)
        c = process.coef(t)
        told = ctx.fork(cond=drop(batch.get("cond", {}), self.student.null, self.dropout, ctx))
        post: Posterior = self.student(linear(c.alpha, x0, c.sigma, noise), t, told)
        error = self._error(post, x0, noise, y, t, end)
        if self.looks is None:
            return Loss(error.mean(), {"error": error.detach().mean()})
        looks = self.looks(post.mean, x0).mean()
        return Loss(error.mean() + self.seen * looks, {"error": error.detach().mean(), "looks": looks.detach()})

    def _error(self, post: Posterior, x0: Tensor, noise: Tensor, y: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """(B,) distances of what is compared, at its weight."""
        process = self.student.process
        if self.read == "end":
            e = process.coef(end)
            return distance(post.at(e.alpha, e.sigma), y, self.metric, self.scale)
        kind = post.kind if self.read == "native" else self.read
        said = post.native if self.read == "native" else post.view(self.read)
        each = distance(said, process.target(kind, x0, noise, t), self.metric, self.scale)
        return each * weight(self.weighting, post.kind, post.coef, **self.numbers) if self.read == "native" else each

    def _inside(self, start: Tensor, end: Tensor, ctx: Context) -> Tensor:
        """The time of each item: within its segment, or the start."""
        if not self.inside:
            return start
        which, place = (unit(streams(ctx)).to(start.device) for _ in range(2))
        return torch.where(which < self.inside, start - (start - end) * place, start)

    @torch.no_grad()
    def _ends(
        self, batch: Mapping[str, Any], segment: Tensor, start: Tensor, end: Tensor, ctx: Context
    ) -> tuple[Tensor, Tensor]:
        """The two ends of each item's segment."""
        if self.teacher is None:
            states = batch.get("states")
            if states is None or states.shape[1] != len(self._times):
                given = "no states" if states is None else f"states at {states.shape[1]} times"
                raise InputError(
                    f"a batch with states (B, {len(self._times)}, *) is wanted, one a time; it has {given}"
                )
            rows = torch.arange(len(states), device=states.device)
            return states[rows, segment], states[rows, segment + 1]
        if "x" not in batch:
            raise InputError(f"Segments with a teacher reads batch['x'], the data; the batch has {sorted(batch)}")
        process, x0 = self.teacher.process, batch["x"]
        start, end = start.to(x0.device), end.to(x0.device)
        x, _ = process.corrupt(x0, start, ctx, noise=ctx.draw(process.space, x0))
        return x, moved(self.teacher, self.solver, x, start, end, self.substeps, ctx)


__all__ = ["Segments", "matched"]
