"""Learn what a frozen denoiser's features say of the clean picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, Frozen, InputError, Loss, Objective
from sfumato.denoisers.features import features
from sfumato.networks.aligner import ConditionAligner, square
from sfumato.objectives import times as time_samplers


class ConditionAlignment(Objective):
    """min E_{x0, t, eps} |A(F(x_t, t), t) - c(x0)|^2, the mean over elements: F features of a frozen network, A the aligner.

    paths  the submodules that are read, in the order of the aligner's ``channels``; () feeds the aligner with x_t itself, the
           control of every claim about features
    times  (process, streams) -> (t, weights): guidance happens at high noise, so that is where it needs to be good

    A batch is {"x": clean states (B, *), "target": conditions (B, c, H, W), "cond": what the network reads}. Player
    'aligner'. Every batch has fresh noise (the published training reuses one draw). Source: Liu, Li, Zhang, Luo, Liu, 2024,
    "LaCon: Late-Constraint Diffusion for Steerable Guided Image Synthesis".
    """

    def __init__(
        self, denoiser: Denoiser, aligner: nn.Module, paths: Sequence[str], *, times: time_samplers.Times | None = None
    ) -> None:
        super().__init__()
        self.denoiser: Any = Frozen(denoiser)
        self.aligner, self.paths = aligner, tuple(paths)
        self.times = time_samplers.Uniform() if times is None else times
        self.couples = any(isinstance(m, nn.BatchNorm2d) for m in aligner.modules())

    def players(self) -> Mapping[str, nn.Module]:
        return {"aligner": self.aligner}

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "aligner") -> Loss:
        missing = {"x", "target"} - set(batch)
        if missing or ctx.rng is None:
            raise InputError(
                f"alignment reads batch['x'] and batch['target'] and draws noise: missing {sorted(missing) or 'streams'}"
            )
        x0, process = batch["x"], self.denoiser.process
        t, weight = (v.to(x0.device) for v in self.times(process, ctx.rng))
        with torch.no_grad():
            x, _ = process.corrupt(x0, t, ctx)
            found = read(self.denoiser, x, t, ctx.fork(cond=batch.get("cond", {})), self.paths)
        said = self.aligner(found, t)
        if said.shape != batch["target"].shape:
            raise InputError(f"the aligner says {tuple(said.shape)}, the targets are {tuple(batch['target'].shape)}")
        error = (said - batch["target"]).square().flatten(1).mean(1)
        return Loss((error * weight.to(error)).mean(), {"error": error.detach().mean()})


def read(denoiser: Denoiser, x: Tensor, t: Any, ctx: Context, paths: Sequence[str]) -> list[Tensor]:
    """The features at these paths; without paths the state itself."""
    if not paths:
        return [x]
    found = features(denoiser, x, t, ctx, paths)[1]
    return [found[path] for path in paths]


@torch.no_grad()
def aligner_for(
    denoiser: Denoiser,
    paths: Sequence[str],
    x: Tensor,
    target: Tensor,
    cond: Mapping[str, Any] | None = None,
    **options: Any,
) -> ConditionAligner:
    """A fresh :class:`sfumato.networks.aligner.ConditionAligner` for these layers: its channels and sizes are read off one
    call with a state x (1, *) and a condition map target (1, c, H, W); options are its other arguments.

    Features are brought to the finest of them. Raises InputError where the target is not a whole multiple of that.
    """
    ctx = Context.of(len(x), None, cond=dict(cond or {}), dtype=x.dtype, device=x.device)
    found = [square(h) for h in read(denoiser, x, 0.5, ctx, paths)]
    size = tuple(max(h.shape[i] for h in found) for i in (2, 3))
    factor = target.shape[-1] // size[1]
    if (size[0] * factor, size[1] * factor) != tuple(target.shape[-2:]):
        raise InputError(
            f"a target of {tuple(target.shape[-2:])} is no whole multiple of features of {size}: resize it"
        )
    return ConditionAligner([h.shape[1] for h in found], target.shape[1], size, factor, **options)


__all__ = ["ConditionAlignment", "aligner_for", "read"]
