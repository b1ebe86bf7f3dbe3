"""Several denoisers at once, weighted by how likely each finds the path: their mixture (OR) or where they agree (AND)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, Guidance, InputError, Posterior
from sfumato.guidance._beliefs import beliefs, combine
from sfumato.guidance._registry import register
from sfumato.guidance.prompts import prompts

MODES = ("or", "and")


class Superposed(Denoiser):
    """See :func:`superpose` and, for several prompts of one denoiser, :func:`superposition`."""

    def __init__(
        self,
        parts: Sequence[Denoiser],
        mode: str = "or",
        temperature: float = 1.0,
        bias: Sequence[float] | None = None,
        prompts: bool = False,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise InputError(f"mode = {mode!r}: one of {', '.join(MODES)}")
        if not parts:
            raise InputError("superpose at least one denoiser")
        if not temperature >= 0:
            raise InputError(f"temperature = {temperature}: 0 (equal weights) or above")
        for other in parts[1:]:
            _check_law(parts[0].process, other.process)
        self.parts, self.mode, self.temperature, self.prompts = nn.ModuleList(parts), mode, temperature, prompts
        self.joins = prompts
        self.bias = None if bias is None else [float(v) for v in bias]
        if not prompts:
            self._biases(len(parts))

    @property
    def process(self) -> Any:  # type: ignore[override]
        return self.parts[0].process

    @property
    def null(self) -> Mapping[str, Any]:  # type: ignore[override]
        return self.parts[0].null  # type: ignore[return-value]

    def forward(self, x: Any, t: Any, ctx: Context) -> Posterior:
        if self.prompts:
            told = {f"part {i}": cond for i, cond in enumerate(prompts(ctx))}
            said = beliefs(self.parts[0], x, t, ctx, told, name="superposition")  # type: ignore[arg-type]
        else:
            said = [part(x, t, ctx.fork(f"part {i}")) for i, part in enumerate(self.parts)]
        own = ctx.fork("superposition").memory
        if "pending" not in own:  # later calls of the same step keep its weights
            own["pending"] = own["weights"] = self._decided(said, x, t, ctx, own)
        return combine(said, own["weights"].unbind(1))

    def _biases(self, n: int) -> list[float]:
        """One bias a belief, 0 where none was given."""
        if self.bias is not None and len(self.bias) != n:
            raise InputError(f"{len(self.bias)} biases for {n} beliefs: give one each")
        return self.bias or [0.0] * n

    def _decided(self, said: Sequence[Posterior], x: Tensor, t: Any, ctx: Context, own: dict[str, Any]) -> Tensor:
        """The weights (B, M) of this step; has the log densities brought to its end once it is accepted."""
        noise, s = _noise(x, t, ctx)
        if "log_density" not in own:
            if ctx.run.step:
                raise InputError("this run begins in its middle: go on with the ctx= that holds its log densities")
            own["log_density"] = torch.zeros(len(x), len(said), dtype=torch.float64, device=x.device)
        log_density = own["log_density"]
        kernels = [self.process.kernel(x, post, t, s) for post in said]
        means, std = torch.stack([k.mean.double().flatten(1) for k in kernels], 1), float(kernels[0].std)
        bias = torch.tensor(self._biases(len(said)), dtype=torch.float64, device=x.device)
        if self.mode == "or":
            weights = (self.temperature * log_density + bias).softmax(1)
        else:
            weights = equalising(means, std, noise, bias - log_density)

        def accepted(there: Any, _: Any) -> None:
            own.pop("pending", None)
            if std > 0:
                y = there.double().flatten(1)
                _check_noise((y - (weights[:, :, None] * means).sum(1)) / std, noise)
                gain = density_gain(self.process, x.double().flatten(1), y, t, s, means, std)
                own["log_density"] = log_density + gain

        ctx.after(accepted)
        return weights


def density_gain(process: Any, x: Tensor, y: Tensor, t: float, s: float, means: Tensor, std: float) -> Tensor:
    """log q_s(y) - log q_t(x) of each model, (B, M): log q(y | x) - log q(x | y), which is Bayes' rule and exact.

    x, y (B, D) at t > s; the reverse kernel is N(means, std^2) with means (B, M, D), which is exact for small steps. To first
    order in t - s it is the Itô estimator <dx, score> + (div f + <f, score> - g^2 |score|^2 / 2) dt of Skreta et al.
    """
    ratio, up = process.transition(s, t)
    reverse = -(y[:, None] - means).square().sum(2) / (2 * std**2) - x.shape[1] * math.log(std)
    forward = -(x - ratio * y).square().sum(1) / (2 * up**2) - x.shape[1] * math.log(up)
    return reverse - forward[:, None]


def equalising(means: Tensor, std: float, noise: Tensor, wanted: Tensor) -> Tensor:
    """Weights (B, M), of sum 1, for which y = sum_j w_j means_j + std noise gives log densities that differ as ``wanted`` does.

    With d_i = (means_i - means_1) / std the gains over model 1 are sum_j w_j <d_j, d_i> + <noise, d_i> - |d_i|^2 / 2, linear
    in w. What is wanted is approached by at most a weight of 1 a step; directions in which the models agree get equal weights.
    Without noise (std = 0) only the means count.
    """
    d = (means[:, 1:] - means[:, :1]) / (std or 1.0)
    gram = d @ d.mT
    size = gram.diagonal(dim1=1, dim2=2)
    gains = 0.5 * size
    if std > 0:
        gap = wanted[:, 1:] - wanted[:, :1]
        gains = gains - (d @ noise[..., None]).squeeze(-1) + torch.maximum(torch.minimum(gap, size), -size)
    equal = torch.full_like(size, 1 / means.shape[1])
    inverse = torch.linalg.pinv(gram, atol=1e-12, rtol=1e-9, hermitian=True)
    others = equal + (inverse @ (gains - (gram @ equal[..., None]).squeeze(-1))[..., None]).squeeze(-1)
    return torch.cat([1 - others.sum(1, keepdim=True), others], 1)


def _noise(x: Any, t: Any, ctx: Context) -> tuple[Tensor, float]:
    """The noise (B, D) of the step under way, in float64, and where it goes."""
    s = ctx.run.s
    if not (isinstance(t, float) and isinstance(s, float)):
        raise InputError("superposition needs one clock for the batch, a number")
    if t != ctx.run.t or not s < t:
        raise InputError(
            f"superposition follows one step at a time down from t = {ctx.run.t}, but was asked at t = {t}"
        )
    noise = ctx.run.noise[-1] if ctx.run.noise else None
    if not isinstance(noise, Tensor) or noise.shape != x.shape:
        raise InputError(
            "superposition reads the noise of the step: use a stochastic solver ('ddpm', 'euler-maruyama', "
            "'dpm-solver++(eta=1.0)'), with guidance that stacks its inputs inside and not around it"
        )
    return noise.double().flatten(1), s


def _check_noise(residual: Tensor, noise: Tensor) -> None:
    """InputError where the step (B, D), less its mean and in units of the kernel's std, has not this noise in it."""
    share = (residual * noise).sum() / noise.square().sum()
    if not share > 0.25:
        raise InputError(
            f"the step carries {float(share):.2f} of the noise of the stochastic equation, on which the densities rely: "
            "use a solver with eta = 1"
        )


def _check_law(one: Any, other: Any) -> None:
    """InputError where two processes differ."""
    same = one == other
    if not same and type(one) is type(other):
        same = all(one.coef(t) == other.coef(t) for t in (0.125, 0.5, 0.875, 1.0))
    if not same:
        raise InputError(
            f"the denoisers follow different processes, {one} and {other}: train or convert one to the other's"
        )


def superpose(
    *denoisers: Denoiser, mode: str = "or", temperature: float = 1.0, bias: Sequence[float] | None = None
) -> Superposed:
    """Frozen denoisers of one process as one: sum_j w_j score_j, with weights from their log densities along the path.

    Each step of a stochastic solver gives the log density of its end under every denoiser, with no call and no divergence:
    ``density_gain``. They start equal (all share the prior) and are kept in ``ctx.memory``, float64 and an item each;
    ``log_densities(ctx)`` reads them. From them

        'or'   w = softmax(temperature log q + bias): samples the mixture of the models
        'and'  w of sum 1 for which all log densities stay equal (given the step's noise, a linear system): samples where
               every model finds x equally likely; ``bias`` asks for differences, log q_i - log q_j = bias_i - bias_j

    'and' cancels the noise along the models' difference, so only differences of its log densities mean something; at the
    last step, without noise, its weights are those of equal gains. One denoiser is only observed: its log density, relative
    to the start's. A step costs one call of each.

    Raises InputError for denoisers of different processes, for solvers that draw no noise or use less of it than the
    stochastic equation has (eta < 1), and for a run resumed without its context. Source: Skreta, Atanackovic, Bose,
    Tong, Neklyudov, 2025, "The Superposition of Diffusion Models Using the Itô Density Estimator".
    """
    return Superposed(denoisers, mode, temperature, bias)


@register("superposition")
def superposition(mode: str = "or", *, temperature: float = 1.0, bias: Sequence[float] | None = None) -> Guidance:
    """:func:`superpose` of one denoiser under the run's prompt and those beside it (``sf.guidance.also``).

    Classifier-free guidance goes inside: ``superposition("and")(cfg(3.0)(denoiser))``. Raises InputError without other
    prompts.
    """
    return lambda inner: Superposed([inner], mode, temperature, bias, prompts=True)


def log_densities(ctx: Context) -> Tensor:
    """(B, M) log q_s(x_s) of each superposed denoiser minus that of the start, after a run with this context."""
    found = _find(ctx.memory)
    if found is None:
        raise InputError("no superposition ran with this context: give it to sample(..., ctx=ctx) first")
    return found


def _find(memory: Mapping[str, Any]) -> Tensor | None:
    """The log densities in a memory or in one of its branches."""
    own = memory.get("superposition")
    if isinstance(own, Mapping) and "log_density" in own:
        return own["log_density"]  # type: ignore[no-any-return]
    branches = (_find(v) for v in memory.values() if isinstance(v, Mapping))
    return next((found for found in branches if found is not None), None)


__all__ = ["Superposed", "density_gain", "equalising", "log_densities", "superpose", "superposition"]
