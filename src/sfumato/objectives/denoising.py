"""Learn to denoise: any process, any prediction, any weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, Frozen, InputError, Loss, Objective, Posterior, tree_map
from sfumato.objectives import times as time_samplers
from sfumato.objectives.weights import Weighting, weight


class Denoising(Objective):
    """min E_{x0, t, eps} w(t) |prediction(x_t, t) - target|^2, the mean over elements and items.

    denoiser    what ``parametrized`` returns; its native prediction is compared with ``process.target``. Player 'denoiser'
    times       (process, streams) -> (t, importance weights): see :mod:`sfumato.objectives.times`
    weighting   a name of :func:`sfumato.objectives.weights.weight`, or a function of the coefficients; ``numbers`` are its
                arguments, e.g. ``{"gamma": 5}``
    dropout     how often a condition is replaced by ``denoiser.null`` (Ho & Salimans, 2022, "Classifier-Free Diffusion
                Guidance"): one rate drops all conditions that have a null together; a mapping drops each name, or group
                'a+b', on its own
    codec       encodes batch["x"] (not trained, not saved)

    A batch is {"x": data (B, *), "cond": {name: (B, *)}}. With "std" (B, *) beside it, x is the mean of an encoder and
    x + std N(0, 1) is trained on (pre-encoded latents); "noise" (B, *) replaces the drawn noise. Item i's time, drops and
    noise come from its own stream. Source: Ho, Jain, Abbeel, 2020, "Denoising Diffusion Probabilistic Models".
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        times: time_samplers.Times | None = None,
        weighting: Weighting = "uniform",
        numbers: Mapping[str, float] | None = None,
        dropout: float | Mapping[str, float] = 0.1,
        codec: Any = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.times = time_samplers.Uniform() if times is None else times
        self.weighting, self.numbers, self.dropout = weighting, dict(numbers or {}), dropout
        self.codec = Frozen(codec) if isinstance(codec, nn.Module) else codec
        for rate in dropout.values() if isinstance(dropout, Mapping) else [dropout]:
            if not 0 <= rate <= 1:
                raise InputError(f"dropout = {dropout}: rates are in [0, 1]")
        one = denoiser.process.coef(torch.full((1,), 0.5, dtype=torch.float64))
        weight(weighting, "v", one, **self.numbers)  # a wrong name is refused here, not an hour later

    def players(self) -> Mapping[str, nn.Module]:
        return {"denoiser": self.denoiser}

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "denoiser") -> Loss:
        process = self.denoiser.process
        x0 = self._data(batch, ctx)
        t, importance = self.times(process, _streams(ctx))
        t, importance = t.to(x0.device), importance.to(x0.device)
        ctx = ctx.fork(cond=drop(batch.get("cond", {}), self.denoiser.null, self.dropout, ctx))
        noise = batch["noise"] if "noise" in batch else ctx.draw(process.space, x0)
        x, _ = process.corrupt(x0, t, ctx, noise=noise)
        post = self.denoiser(x, t, ctx)
        if not isinstance(post, Posterior):
            raise InputError(f"Denoising needs one Gaussian prediction, the denoiser returned a {type(post).__name__}")
        target = process.target(post.kind, x0, noise, t)
        error = (post.native.float() - target.float() if x0.dtype != torch.float64 else post.native - target).square()
        error = error.flatten(1).mean(1)
        weighted = error * weight(self.weighting, post.kind, post.coef, **self.numbers)
        if isinstance(self.times, time_samplers.ByLoss):
            self.times.observe(t, weighted)
        return Loss((weighted * importance).mean(), {"error": error.detach().mean()})

    def after_step(self, it: int) -> None:
        if isinstance(self.times, time_samplers.ByLoss):
            self.times.fold()

    @torch.no_grad()
    def _data(self, batch: Mapping[str, Any], ctx: Context) -> Tensor:
        if "x" not in batch:
            raise InputError(f"Denoising reads batch['x'], the data; the batch has {sorted(batch)}")
        if self.codec is not None:
            return self.codec.encode(batch["x"], ctx)  # type: ignore[no-any-return]
        x: Tensor = batch["x"]
        if not x.is_floating_point():
            raise InputError(f"batch['x'] is {x.dtype}: give floating-point data, e.g. images in [-1, 1]")
        return x + batch["std"] * _streams(ctx).normal(x) if "std" in batch else x


def drop(
    cond: Mapping[str, Any], null: Mapping[str, Any], rates: float | Mapping[str, float], ctx: Context
) -> Mapping[str, Any]:
    """The conditions with some items replaced by the null: see ``dropout`` of :class:`Denoising`.

    Raises InputError where a condition to drop is absent or has no null.
    """
    groups: list[tuple[Sequence[str], float]]
    if isinstance(rates, Mapping):
        groups = [(names.split("+"), rate) for names, rate in rates.items()]
    else:
        groups = [([name for name in cond if name in null], rates)] if rates and cond else []
    out = dict(cond)
    for names, rate in groups:
        lacking = [name for name in names if name not in null or name not in cond]
        if lacking or not names:
            raise InputError(
                f"dropout of {lacking or sorted(cond)}: the batch has conditions {sorted(cond)} and the denoiser has a null "
                f"for {sorted(null) or 'none'}; give parametrized(null=...), or dropout=0"
            )
        gone = _streams(ctx).uniform(torch.empty(ctx.batch, dtype=torch.float64)) < rate
        for name in names:
            out[name] = tree_map(lambda v, z, gone=gone: _replace(v, z, gone), cond[name], null[name])
    return out


def _replace(value: Tensor, null: Any, gone: Tensor) -> Tensor:
    mask = gone.to(value.device).view(-1, *[1] * (value.ndim - 1))
    nothing = torch.as_tensor(null).to(value.device, value.dtype)
    return torch.where(mask, nothing, value)


def _streams(ctx: Context) -> Any:
    if ctx.rng is None:
        raise InputError("an objective draws times and noise: give it a context with streams, Context.of(batch, seed)")
    return ctx.rng
