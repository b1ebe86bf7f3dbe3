"""Keep what is outside a mask: a steering that puts the known part back after every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sfumato.core import Context, Denoiser, Solver, Step, Times, Wrap, linear


@dataclass(frozen=True)
class Blended(Wrap):
    """x_s <- m x_s + (1 - m) (alpha_s x0 + sigma_s eps) after each inner step.

    mask   (B, 1, *) or (B, *): 1 where the inner solver decides
    known  x0 (B, *); noise: the eps it is noised with, the same at every time, so the known part is one DDIM path

    At s = 0 the known part is x0 itself. Source: Avrahami, Lischinski, Fried, 2022, "Blended Diffusion for Text-driven
    Editing of Natural Images"; Lugmayr et al., 2022, "RePaint".
    """

    inner: Solver
    mask: Tensor
    known: Tensor
    noise: Tensor

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        there = self.inner.step(st, s, denoiser, ctx)
        c = denoiser.process.coef(s)
        known = linear(c.alpha, self.known, c.sigma, self.noise)
        return replace(there, x=blend(there.x, known, self.mask))


def blend(inside: Any, outside: Any, mask: Tensor) -> Any:
    """mask inside + (1 - mask) outside, where mask = 0 or 1 exactly the one or the other."""
    return linear(mask, inside, 1.0 - mask, outside)


__all__ = ["Blended", "blend"]
