"""Few large denoising steps, each a conditional generative adversarial network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfumato.core import Context, Denoiser, InputError, Loss, Objective
from sfumato.objectives.distill._common import falling, one_of


def _differentiable(twice: bool) -> AbstractContextManager[None]:
    """Attention by plain products where a gradient of its gradient is wanted: fused kernels have none."""
    return sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()


class DenoisingGAN(Objective):
    """min over the generator of max over the critic: real and generated pairs (x_s, x_t), s < t neighbours of a coarse grid.

    Real: x_s = alpha_s x0 + sigma_s eps, x_t from it by the process. Generated: x_s drawn from q(x_s | x_t, x0) at the
    generator's x0. The critic learns softplus(-C(real)) + softplus(C(generated)), every ``lazy`` iterations with
    r1 / 2 |d C / d x_s|^2 of the real ones beside it; the generator softplus(-C(generated)).

    generator  a Denoiser whose x0 is a draw, as that of a network with ``draws`` is; player 'generator'
    critic     (x_s, x_t, label (B,), **cond) -> (B,) or (B, 1), the label being t, told those conditions of the batch that it
               names in ``accepts``; player 'critic'
    times      t_0 > ... > t_K: K steps. Published: equal steps of VP(0.1, 20) from 1 to 0.001
    regress    weight of |x0' - x0|^2 beside it, 0 as published

    A batch is {"x": data, "cond"}. Sample with 'ddpm' on ``times``. Source: Xiao, Kreis, Vahdat, 2022, "Tackling the
    Generative Learning Trilemma with Denoising Diffusion GANs".
    """

    def __init__(
        self,
        generator: Denoiser,
        critic: nn.Module,
        times: Sequence[float],
        *,
        r1: float = 0.02,
        lazy: int = 15,
        regress: float = 0.0,
    ) -> None:
        super().__init__()
        if r1 < 0 or lazy < 1 or regress < 0:
            raise InputError(f"r1 = {r1}, lazy = {lazy}, regress = {regress}: weights not negative, lazy at least 1")
        self._times = falling(times)
        self.generator, self.critic, self.r1, self.lazy, self.regress = generator, critic, r1, lazy, regress

    def players(self) -> Mapping[str, nn.Module]:
        return {"generator": self.generator, "critic": self.critic}

    def turns(self, it: int) -> Sequence[Sequence[str]]:
        return [["critic"], ["generator"]]

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "generator") -> Loss:
        if "x" not in batch:
            raise InputError(f"DenoisingGAN reads batch['x'], the data; the batch has {sorted(batch)}")
        ctx, process, x0 = ctx.fork(cond=batch.get("cond", {})), self.generator.process, batch["x"]
        step = one_of(len(self._times) - 1, ctx)
        t, s = self._times[step].to(x0.device), self._times[step + 1].to(x0.device)
        low, _ = process.corrupt(x0, s, ctx)
        high = process.renoise(low, s, t, ctx.draw(process.space, x0))
        with torch.set_grad_enabled(player == "generator" and torch.is_grad_enabled()):
            post = self.generator(high, t, ctx.fork("generator"))
            made = process.kernel(high, post, t, s).draw(ctx.draw(process.space, x0))
        if player == "critic":
            return self._judged(low, made, high, t, ctx)
        fool = F.softplus(-self._says(made, high, t, ctx)).mean()
        if not self.regress:
            return Loss(fool, {"fool": fool.detach()})
        error = (post.mean - x0).square().mean()
        return Loss(fool + self.regress * error, {"fool": fool.detach(), "error": error.detach()})

    def _judged(self, low: Tensor, made: Tensor, high: Tensor, t: Tensor, ctx: Context) -> Loss:
        """The loss of the critic, with the penalty of its slope where that is due."""
        penalised = bool(self.r1) and ctx.run.step % self.lazy == 0 and torch.is_grad_enabled()
        low = low.detach().requires_grad_(penalised)
        with _differentiable(penalised):
            real = self._says(low, high, t, ctx)
        loss = F.softplus(-real).mean() + F.softplus(self._says(made, high, t, ctx)).mean()
        terms = {"critic": loss.detach()}
        if penalised:
            (slope,) = torch.autograd.grad(real.sum(), low, create_graph=True)
            penalty = slope.square().flatten(1).sum(1).mean()
            terms["slope"] = penalty.detach()
            loss = loss + 0.5 * self.r1 * penalty
        return Loss(loss, terms)

    def _says(self, low: Tensor, high: Tensor, t: Tensor, ctx: Context) -> Tensor:
        """The logits (B,) of pairs."""
        told = {k: v for k, v in ctx.cond.items() if k in getattr(self.critic, "accepts", ())}
        return self.critic(low, high, t.to(low), **told).flatten()  # type: ignore[no-any-return]
