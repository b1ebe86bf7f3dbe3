"""Denoisers of stochastic interpolants: networks for velocity and noise, the exact mixture, and a run the other way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, InputError, Wrapper, linear, tapped
from sfumato.core.trees import Times
from sfumato.denoisers.oracles import GaussianMixture
from sfumato.denoisers.parametrized import Parametrized
from sfumato.processes.interpolant import Interpolant, Transport


class Interpolated(Denoiser):
    """Networks ``net(x, label, **cond) -> Tensor`` for the readings of an interpolant, as one Denoiser.

    networks  kind -> network, of 'flow' | 'drift' (one of them, none on the mirror path) and 'eps' | 'score' (one of them,
              or none: then only deterministic sampling follows, and 'drift' only where gamma = 0); 'drift+eps' is one
              network with both readings along its channels, axis 1
    clock     t -> the label the networks were trained with (default: t itself)
    null      what "no condition" is, by name

    Its belief is a :class:`sfumato.processes.Transport`. Taps name submodules as 'KIND.PATH', '+' and all. Raises
    InputError for other kinds or combinations.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        process: Interpolant,
        clock: Callable[[Any], Any] | None = None,
        null: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.kinds = tuple(kind for name in networks for kind in name.split("+"))
        _check(self.kinds, process)
        self.networks, self.process, self.null = nn.ModuleDict(networks), process, dict(null or {})
        # each network reads labels and conditions as a wrapped one does
        self._readers = {name: Parametrized(net, process, "eps", clock) for name, net in networks.items()}

    def forward(self, x: Tensor, t: Times, ctx: Context) -> Transport:
        given: dict[str, Tensor] = {}
        for name, net in self.networks.items():
            reader, kinds = self._readers[name], name.split("+")
            with tapped(self.networks, ctx):
                out = net(x, reader._label(t, x), **reader._conditions(ctx))
            given |= dict(zip(kinds, out.chunk(len(kinds), 1), strict=True))
        if self.process.path == "mirror":
            given["drift"] = torch.zeros_like(x)
        ctx.run.nfe += len(x) / ctx.batch
        return Transport(given, x, self.process.at(t))


def _check(given: tuple[str, ...], process: Interpolant) -> None:
    kinds = set(given)
    wrong = kinds - {"flow", "drift", "eps", "score"} or len(kinds) < len(given)
    if wrong or {"flow", "drift"} <= kinds or {"eps", "score"} <= kinds:
        raise InputError(f"networks of {sorted(given)}: at most one of 'flow', 'drift' and one of 'eps', 'score'")
    if not kinds & {"flow", "drift"} and process.path != "mirror":
        raise InputError(
            f"the {process.path} path needs a network for its 'flow' or its 'drift', not only {sorted(given)}"
        )
    if kinds & {"flow", "drift"} and process.path == "mirror":
        raise InputError("the mirror path has no velocity of its own: give only a network for 'eps' or 'score'")
    if "drift" in kinds and not kinds & {"eps", "score"} and process.gamma != "zero":
        raise InputError("a 'drift' moves x only together with the noise: add a network for 'eps' or 'score'")


class GaussianMixtureInterpolant:
    """The exact belief of an interpolant between two independent Gaussian mixtures.

    With x0 ~ sum_i p_i N(n_i, D_i) and x1 ~ sum_j q_j N(m_j, C_j), x_t ~ sum_ij p_i q_j N(m_ij, C_ij), m_ij = alpha n_i +
    beta m_j, C_ij = alpha^2 D_i + beta^2 C_j + gamma^2, and every conditional mean is linear in C_ij^-1 (x - m_ij) within
    a component. On the mirror path x1 is not used. All readings are finite at both ends.
    """

    def __init__(self, data: GaussianMixture, base: GaussianMixture) -> None:
        if data.shape != base.shape:
            raise InputError(f"the two ends live on {data.shape} and {base.shape}: one space is needed")
        self.data, self.base, self.shape = data, base, data.shape
        k, n = len(data.weights), len(base.weights)
        self.pairs = [(i, j) for i in range(k) for j in range(n)]
        rows, columns = (torch.tensor(v) for v in zip(*self.pairs, strict=True))
        self.means = data.means[rows], base.means[columns]
        self.variances = data.variances[rows], base.variances[columns]
        self.log_weights = (data.weights[rows] * base.weights[columns]).log()

    def denoiser(self, process: Interpolant) -> InterpolantOracle:
        """The exact Denoiser under ``process``."""
        return InterpolantOracle(self, process)

    def readings(self, x: Tensor, c: Any) -> dict[str, Tensor]:
        """Every reading at x (B, d) with the path's coefficients c."""
        inside, share = self._components(x, c)
        share = share.softmax(-1)[..., None]
        ends = [
            m.to(x) + _wide(a, x) * v.to(x) * inside for a, m, v in zip(c[:2], self.means, self.variances, strict=True)
        ]
        x0, x1 = ((share * end).sum(1) for end in ends)
        pull = (share * inside).sum(1)  # -score
        drift = linear(c.dalpha, x0, c.dbeta, x1)
        return {
            "score": -pull,
            "drift": drift,
            "flow": linear(1.0, drift, c.product, pull),
            "eps": linear(c.gamma, pull),
            "x0": x0,
            "x1": x1,
        }

    def log_prob(self, x: Tensor, c: Any) -> Tensor:
        """log density of x_t at x (B, d), in nats (B,)."""
        logits = self._components(x.double(), c)[1]
        return logits.logsumexp(-1) - 0.5 * self.shape[0] * math.log(2 * math.pi)

    def _components(self, x: Tensor, c: Any) -> tuple[Tensor, Tensor]:
        """C^-1 (x - m) (B, KL, d) and log p q N(x; m, C) up to the constant (B, KL)."""
        if x.ndim != 2 or tuple(x.shape[1:]) != self.shape:
            raise InputError(f"these mixtures live on {self.shape}, not on {tuple(x.shape[1:])}")
        a, b, g = (_wide(v, x) for v in c[:3])
        (m0, m1), (v0, v1) = (tuple(v.to(x) for v in pair) for pair in (self.means, self.variances))
        total = (a * a * v0 + b * b * v1 + g * g).clamp(min=torch.finfo(x.dtype).tiny)
        residual = x[:, None] - (a * m0 + b * m1)
        inside = residual / total
        return inside, self.log_weights.to(x) - 0.5 * ((residual * inside).sum(-1) + total.log().sum(-1))


class InterpolantOracle(Denoiser):
    """The exact Denoiser of a :class:`GaussianMixtureInterpolant`."""

    def __init__(self, mixtures: GaussianMixtureInterpolant, process: Interpolant) -> None:
        super().__init__()
        self.mixtures, self.process = mixtures, process

    def forward(self, x: Tensor, t: Times, ctx: Context) -> Transport:
        path = self.process.at(t)
        ctx.run.nfe += len(x) / ctx.batch
        return Transport(self.mixtures.readings(x, path), x, path)


class Reversed(Wrapper):
    """The same interpolant run the other way: its 'data' is the x1 of ``inner``.

    Sampling it leads from samples of x0 to samples of x1, also with noise, which is the backward equation of ``inner``.
    Every path and gamma is its own mirror image in time, so the process is the same; velocities change sign.
    """

    def forward(self, x: Tensor, t: Times, ctx: Context) -> Transport:
        belief: Transport = self.inner(x, 1.0 - t, ctx)  # type: ignore[operator]
        swap = {"x0": "x1", "x1": "x0"}
        sign = {"flow": -1.0, "drift": -1.0}
        given = {swap.get(k, k): linear(sign.get(k, 1.0), v) for k, v in belief.given.items()}
        return replace(belief, given=given, path=self.process.at(t))


def _wide(v: Any, x: Tensor) -> Any:
    """A number, or (B,) as (B, 1, 1) of the dtype and device of x."""
    return v.to(x)[:, None, None] if isinstance(v, Tensor) else v
