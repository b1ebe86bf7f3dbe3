"""One belief read under another process: the frameworks of diffusion models are changes of variables of each other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Posterior, Wrapper, linear, row
from sfumato.processes import Gaussian


class Converted(Wrapper):
    """See :func:`converted`."""

    def __init__(self, inner: Denoiser, process: Gaussian) -> None:
        super().__init__(inner)
        for law in (inner.process, process):
            if not isinstance(law, Gaussian) or type(law).anchor is not Gaussian.anchor:
                raise InputError(
                    f"only Gaussian laws without an anchor are changes of variables of each other, not {law}"
                )
        self._process = process

    @property
    def process(self) -> Any:  # type: ignore[override]
        return self._process

    def match(self, t: Any) -> tuple[Any, Any]:
        """(time, scale): the inner state is ``scale`` times the outer one, at the inner time of the same signal to noise."""
        return self._process.weights(self._match, t)  # type: ignore[return-value]

    def _match(self, process: Gaussian, t: float) -> tuple[float, float]:
        c, law = process.coef(t), self.inner.process
        s = law.time(c.lam)
        if -1e-9 < s < 0 or 1 < s < 1 + 1e-9:  # round-off at an end that both share
            s = round(s)
        if not 0 <= s <= 1:
            low, high = law.coef(1.0).lam, process.coef(1.0).lam
            raise InputError(
                f"{process} at t = {t:g} is noisier than {law} ever is (log alpha / sigma = {c.lam:.3f}, it ends at {low:.3f}, "
                f"{high:.3f} asked at t = 1): start later, or choose a process that ends there"
            )
        d = law.coef(s)
        return s, d.alpha / c.alpha if c.alpha else d.sigma / c.sigma

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        s, scale = self.match(t)
        inside = linear(scale, x)
        post = self.inner(inside, s, ctx)
        if not isinstance(post, Posterior):
            raise InputError(f"a {type(post).__name__} belief has no other reading under {self._process}")
        kind = post.kind if post.kind in ("x0", "eps") else row(post.kind, post.coef)
        moved = x if post.x is inside else linear(1.0 / scale, post.x)  # an inner wrapper may have moved the state
        return Posterior(post.native, kind, moved, self._process.coef(t), post.var, post.aux)


def converted(denoiser: Denoiser, process: Gaussian) -> Converted:
    """The same belief under another Gaussian process: x is scaled, and times are matched by lambda = log(alpha / sigma).

    x_inner = (alpha_inner / alpha) x at the inner time with the same lambda; x0 and eps are what they were. So a network
    trained as DDPM (VP) runs in the samplers of NCSN (VE), and the other way round: score_VE(x) = alpha score_VP(alpha x).
    DDIM and the exponential solvers take the same steps under both, up to the scale; others agree in the limit. Raises InputError for anchored
    laws, and at a time that is noisier than the denoiser's own process ever is.
    Source: Song et al. 2021, "Score-Based Generative Modeling through SDEs"; Karras et al. 2022, "Elucidating the Design Space of
    Diffusion-Based Generative Models"; Kingma, Salimans, Poole, Ho, 2021, "Variational Diffusion Models".
    """
    return Converted(denoiser, process)


__all__ = ["Converted", "converted"]
