"""Guidance from inside: the output of one submodule is changed while the network runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError, Wrapper
from sfumato.denoisers.features import bottleneck, changing

Change: TypeAlias = Callable[[Tensor, Any], Tensor]
"""(h (B, *), t) -> h."""


class Internal(Wrapper):
    """See :func:`internal`."""

    def __init__(
        self,
        inner: Denoiser,
        change: Change,
        path: str | None = None,
        interval: tuple[float, float] | None = None,
        asymmetric: bool = False,
    ) -> None:
        super().__init__(inner)
        if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
            raise InputError(f"interval = {interval}: (low, high) with 0 <= low <= high <= 1 in time t")
        self.change, self.interval, self.asymmetric = change, interval, asymmetric
        self.path = bottleneck(inner) if path is None else path

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        if self.interval is not None:
            if isinstance(t, Tensor):
                raise InputError("an interval of changed features needs one clock for the batch")
            if not self.interval[0] <= t <= self.interval[1]:
                return self.inner(x, t, ctx)
        edited = self.inner(x, t, ctx.fork(taps=[changing(self.path, lambda h: self.change(h, t))]))
        if not self.asymmetric:
            return edited
        plain = self.inner(x, t, ctx.fork("unchanged"))
        return plain.but(keep=("eps",), x0=edited.mean)


def internal(
    change: Change,
    path: str | None = None,
    *,
    interval: tuple[float, float] | None = None,
    asymmetric: bool = False,
) -> Guidance:
    """Replace the output h of one submodule by change(h, t), in every call of the network.

    change      (h (B, *), t) -> h; row i should depend on row i only. Give back h itself and nothing happens, exactly
    path        the submodule; default: the bottleneck (:func:`sfumato.denoisers.features.bottleneck`)
    interval    (low, high): only while low <= t <= high
    asymmetric  only the predicted x0 is the changed network's, the direction to x_t stays the plain one's: two calls.
                The belief (x0 changed, eps plain) makes DDIM x_s = alpha_s x0' + sigma_s eps

    Put it inside classifier-free guidance, ``cfg(3.0)(internal(...)(denoiser))``. Sources: Kwon, Jeong, Uh, 2023,
    "Diffusion Models already have a Semantic Latent Space" (asymmetric); Haas, Huberman-Spiegelglas, Mulayoff, Graßhof,
    Brandt, Michaeli, 2024, "Discovering Interpretable Directions in the Semantic Latent Space of Diffusion Models".
    """
    return lambda inner: Internal(inner, change, path, interval, asymmetric)


__all__ = ["Change", "Internal", "internal"]
