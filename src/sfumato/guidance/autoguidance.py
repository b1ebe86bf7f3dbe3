"""Guidance by a worse version of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Wrapper
from sfumato.guidance._beliefs import combine
from sfumato.guidance._registry import register
from sfumato.guidance.classifier_free import check_interval, scale_at


class Autoguided(Wrapper):
    """See :class:`Autoguidance`."""

    def __init__(
        self,
        inner: Denoiser,
        scale: float,
        worse: Denoiser | None = None,
        skip: Sequence[str] = (),
        interval: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(inner)
        check_interval(interval)
        if isinstance(worse, str):
            raise InputError(f"worse = {worse!r} is the name of a model: a pipeline opens it, here give the Denoiser")
        if (worse is None) == (not skip):
            raise InputError(
                "autoguidance needs a worse model: give worse= (a Denoiser), or skip= (submodules to leave out)"
            )
        if worse is not None and worse.process != inner.process:
            raise InputError(
                f"the worse model follows {worse.process}, this one {inner.process}: sf.denoisers.converted changes it"
            )
        self.scale, self.worse, self.skip, self.interval = scale, worse, tuple(skip), interval

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        scale = scale_at(t, self.scale, self.interval)
        post = self.inner(x, t, ctx.fork("better"))
        if not isinstance(scale, Tensor) and scale == 1:
            return post
        if self.worse is None:
            other = self.inner(x, t, ctx.fork("worse", taps=[(path, _skipped) for path in self.skip]))
        else:
            other = self.worse(x, t, ctx.fork("worse"))
        return combine([post, other], [scale, 1.0 - scale])


def _skipped(ctx: Context, call: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A tap that leaves its submodule out."""
    return x


@register("autoguidance")
@dataclass(frozen=True, eq=False)
class Autoguidance:
    """worse + scale (model - worse), both under the same conditions: away from what a worse model does wrong.

    scale     1 is no guidance (and one call)
    worse     a Denoiser of the same process: an earlier checkpoint, a smaller network, one trained on less; a name in the
              spec of a pipeline
    skip      or: the model itself with these submodules left out (skip-layer guidance), each one whose output has the shape of
              its first input, such as ("blocks.5",) of a transformer or ("level.deep",) of a U-Net
    interval  (low, high): guide only while low <= t <= high

    With the null-conditioned model itself as the worse one it is :func:`cfg`. Two calls. Sources: Karras, Aittala,
    Kynkäänniemi, Lehtinen, Aila, Laine, 2024, "Guiding a Diffusion Model with a Bad Version of Itself"; Hyung, Kim, Hong, Kim,
    Choo, 2024, "Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling" (skip).
    """

    scale: float
    worse: Any = None
    skip: Sequence[str] = ()
    interval: tuple[float, float] | None = None

    def __call__(self, inner: Denoiser) -> Denoiser:
        return Autoguided(inner, self.scale, self.worse, self.skip, self.interval)


autoguidance = Autoguidance

__all__ = ["Autoguidance", "Autoguided", "autoguidance"]
