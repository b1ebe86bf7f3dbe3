"""Distribution matching: a student whose samples a critic of their own law cannot tell from the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, Frozen, InputError, Loss, Objective
from sfumato.objectives.distill._common import distance, falling, one_of, readable
from sfumato.objectives.times import Times, Uniform


class DistributionMatching(Objective):
    """The gradient of KL(student's samples || teacher's) over all noise levels, with a critic that learns the samples' score.

    y is the student's sample of fresh noise: for one time in ``times`` it is one call; for several the steps before a
    uniformly drawn one are taken without gradients, with DDIM, and y is that step's belief about x0. With y_t = alpha y +
    sigma eps at a drawn t, the student descends along

        g = (critic's x0 at y_t - teacher's x0 at y_t) / mean |y - teacher's x0|

    by minimising 1/2 |y - sg(y - g)|^2; the critic learns to denoise y. Player 'student' takes part in every ``ratio``-th
    iteration, player 'critic' in each.

    student   its x0 at t = 1 is a sample
    teacher   a Denoiser, with its guidance around it
    critic    a Denoiser that begins as a copy of the teacher without guidance
    times     falling, the student's steps: (1, 0) for one
    levels    where y is noised: see :mod:`sfumato.objectives.times`
    pairs     weight of the regression d(y(noise), sample) on batch["states"] (B, 2, *), a pair of the teacher an item, which
              keeps all modes; 0: the batch needs conditions alone
    metric    of that regression, with ``scale``

    A batch is {"cond"} and, with ``pairs``, "states"; ``Trainer(data=None, batch=n)`` serves an unconditional student.
    ``shape`` of an item is needed where there are no states. Sources: Yin et al., 2024, "One-step Diffusion with
    Distribution Matching Distillation"; several steps and critic turns: Yin et al., 2024, "Improved Distribution Matching
    Distillation for Fast Image Synthesis".
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        critic: Denoiser,
        times: Sequence[float] = (1.0, 0.0),
        *,
        shape: Sequence[int] | None = None,
        levels: Times | None = None,
        pairs: float = 0.0,
        metric: str = "l2",
        scale: float = 1e-3,
        matching: float = 1.0,
        ratio: int = 1,
    ) -> None:
        super().__init__()
        if student is critic:
            raise InputError("student and critic are two networks: copy one")
        if ratio < 1 or pairs < 0 or matching < 0 or pairs + matching == 0:
            raise InputError(
                f"ratio = {ratio}, pairs = {pairs}, matching = {matching}: ratio at least 1, some weight above 0"
            )
        if shape is None and not pairs:
            raise InputError("without pairs the objective has to be told the shape of an item: give shape=")
        self._times = falling(times)
        readable(student, self._times[:-1].tolist())
        self.student, self.critic, self.teacher = student, critic, Frozen(teacher)
        self.shape = None if shape is None else tuple(shape)
        self.levels = Uniform(0.02, 0.98) if levels is None else levels
        self.pairs, self.metric, self.scale, self.matching, self.ratio = pairs, metric, scale, matching, ratio

    def players(self) -> Mapping[str, nn.Module]:
        return {"student": self.student, "critic": self.critic}

    def turns(self, it: int) -> Sequence[Sequence[str]]:
        return [["critic"]] if it % self.ratio else [["student"], ["critic"]]

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "student") -> Loss:
        ctx = ctx.fork(cond=batch.get("cond", {}))
        return self._critic(batch, ctx) if player == "critic" else self._student(batch, ctx)

    def _student(self, batch: Mapping[str, Any], ctx: Context) -> Loss:
        """The loss whose gradient in the sample is fake - real, and that of the pairs."""
        total, terms = torch.zeros(()), {}
        if self.matching:
            y = self._sample(batch, ctx)
            gradient = self._gradient(y.detach(), ctx)
            loss = 0.5 * distance(y, y.detach() - gradient).mean()
            total, terms = total.to(y) + self.matching * loss, {"matching": gradient.square().mean()}
        if self.pairs:
            x, x0 = self._pair(batch)
            y = self.student(x, self._start(x), ctx.fork("pair")).mean
            loss = distance(y, x0, self.metric, self.scale).mean()
            total, terms = total.to(y) + self.pairs * loss, {**terms, "pairs": loss.detach()}
        return Loss(total, terms)

    def _critic(self, batch: Mapping[str, Any], ctx: Context) -> Loss:
        """Denoising of the student's samples."""
        process = self.critic.process
        with torch.no_grad():
            y = self._sample(batch, ctx)
            t, importance = self.levels(process, ctx.rng)  # type: ignore[arg-type]
            t = t.to(y.device)
            noise = ctx.draw(process.space, y)
            x, _ = process.corrupt(y, t, ctx, noise=noise)
        post = self.critic(x, t, ctx.fork("critic"))
        error = distance(post.native, process.target(post.kind, y, noise, t))
        return Loss((error * importance.to(error)).mean(), {"error": error.detach().mean()})

    @torch.no_grad()
    def _gradient(self, y: Tensor, ctx: Context) -> Tensor:
        """(fake - real) / mean |y - real| at a drawn level of noise."""
        process = self.critic.process
        t = self.levels(process, ctx.rng)[0].to(y.device)  # type: ignore[arg-type]
        x, _ = process.corrupt(y, t, ctx)
        real = self.teacher(x, t, ctx.fork("teacher", look=True)).mean
        fake = self.critic(x, t, ctx.fork("critic", look=True)).mean
        size = (y - real).abs().flatten(1).mean(1).clamp(min=1e-6)
        return (fake - real) / size.view(-1, *[1] * (y.ndim - 1))

    def _sample(self, batch: Mapping[str, Any], ctx: Context) -> Tensor:
        """The student's belief at one of its steps, from fresh noise."""
        process, first = self.student.process, float(self._times[0])
        shape = self.shape if self.shape is not None else batch["states"].shape[2:]
        like = torch.empty(ctx.batch, *shape, device=ctx.device)  # type: ignore[misc]
        x = process.coef(first).sigma * ctx.draw(process.space, like)
        steps = len(self._times) - 1
        if steps == 1:
            return self.student(x, self._start(x), ctx.fork("sample")).mean  # type: ignore[no-any-return]
        at = one_of(steps, ctx).to(x.device)
        with torch.no_grad():
            for k in range(steps - 1):
                c = process.coef(float(self._times[k + 1]))
                further = self.student(x, self._start(x, k), ctx.fork("sample", look=True)).at(c.alpha, c.sigma)
                x = torch.where((at > k).view(-1, *[1] * (x.ndim - 1)), further, x)
        return self.student(x, self._times.to(x.device)[at], ctx.fork("sample")).mean  # type: ignore[no-any-return]

    def _start(self, x: Tensor, k: int = 0) -> Tensor:
        """The k-th time, one an item."""
        return self._times[k].to(x.device).expand(len(x))

    def _pair(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Noise and sample. InputError where the batch has none."""
        states = batch.get("states")
        if states is None or states.shape[1] != 2:
            raise InputError(
                f"pairs > 0 needs batch['states'] (B, 2, *), noise and sample; the batch has {sorted(batch)}"
            )
        return states[:, 0], states[:, 1]


__all__ = ["DistributionMatching"]
