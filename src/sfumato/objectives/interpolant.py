"""Learn the velocity and the noise of a stochastic interpolant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.core import InputError, Loss, Objective, tree_map
from sfumato.core.context import Context
from sfumato.denoisers.interpolants import Interpolated
from sfumato.objectives import times as time_samplers


class InterpolantMatching(Objective):
    """min E[|f(x_t)|^2 / 2 - y . f(x_t)] for every network f of an :class:`Interpolated` denoiser, y what it should say.

    y is dx_t/dt for 'flow', alpha' x0 + beta' x1 for 'drift', z for 'eps', -z / gamma for 'score': the unique minimisers
    are the conditional means. The constant |y|^2 / 2, whose variance is infinite where gamma' is, is left out, so losses
    may be negative. They are means over elements and items, and are added.

    denoiser    the networks and their process; player 'denoiser'
    antithetic  each pair is seen with z and with -z at the same time, which takes the 1 / gamma out of the variance of
                the 'flow' and 'score' losses
    times       (process, streams) -> (t, importance weights); default uniform on [0.001, 0.999], off the ends where
                gamma' and 1 / gamma are infinite

    A batch is {"x": x0 (B, *), "x1": x1 (B, *), "cond": {name: (B, *)}}; the pairing of x and x1 is the coupling. Without
    "x1" it is N(0, I). Item i's time and noise come from its own stream. Raises InputError for ends of different shapes.
    Source: Albergo, Boffi, Vanden-Eijnden, 2023, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions".
    """

    def __init__(
        self, denoiser: Interpolated, *, antithetic: bool = True, times: time_samplers.Times | None = None
    ) -> None:
        super().__init__()
        self.denoiser, self.antithetic = denoiser, antithetic
        self.times = time_samplers.Uniform(0.001, 0.999) if times is None else times

    def players(self) -> Mapping[str, Any]:
        return {"denoiser": self.denoiser}

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "denoiser") -> Loss:
        process = self.denoiser.process
        x0, x1 = self._ends(batch, ctx)
        t, weight = (v.to(x0.device) for v in self.times(process, ctx.rng))  # type: ignore[arg-type]
        noise: Any = ctx.draw(process.space, x0)
        both = (1.0, -1.0) if self.antithetic and process.gamma != "zero" else (1.0,)
        x = torch.cat([process.between(x0, x1, t, sign * noise) for sign in both])
        n = len(both)
        rows = tree_map(lambda v: v.repeat(n, *[1] * (v.ndim - 1)), dict(batch.get("cond", {})))
        belief = self.denoiser(x, t.repeat(n), ctx.fork(cond=rows, batch=len(x)))
        terms: dict[str, Tensor] = {}
        for kind in self.denoiser.kinds:
            said = belief.given[kind]
            wanted = torch.cat([process.target(kind, x0, sign * noise, t, x1) for sign in both])
            loss = (0.5 * said.square() - wanted.to(said) * said).flatten(1).mean(1)
            terms[kind] = (loss * weight.repeat(n).to(loss)).mean()
        total = torch.stack(list(terms.values())).sum()
        return Loss(total, {kind: value.detach() for kind, value in terms.items()} if len(terms) > 1 else {})

    def _ends(self, batch: Mapping[str, Any], ctx: Context) -> tuple[Tensor, Tensor]:
        if "x" not in batch:
            raise InputError(f"an interpolant is taught with batch['x'] and batch['x1']; the batch has {sorted(batch)}")
        if ctx.rng is None:
            raise InputError(
                "an objective draws times and noise: give it a context with streams, Context.of(batch, seed)"
            )
        x0: Tensor = batch["x"]
        x1: Any = batch["x1"] if "x1" in batch else ctx.draw(self.denoiser.process.space, x0)
        if x0.shape != x1.shape:
            raise InputError(
                f"batch['x'] is {tuple(x0.shape)} and batch['x1'] {tuple(x1.shape)}: pairs are of one shape"
            )
        return x0, x1
