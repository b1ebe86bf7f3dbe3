"""Denoisers whose score is the gradient of a scalar network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, InputError, Posterior, linear

KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish, nn.Threshold)


class Potential(Denoiser):
    """A conservative denoiser: its score is the gradient of a scalar, u(x, t), a model of log p_t up to a constant.

    net        net(x (B, *), label (B,)) -> (B, 1) or (B,) is the scalar w; with ``quadratic`` it gives N (B, *) and
               w = -|x - N(x, t)|^2 / 2, which trains like a denoising network (Salimans & Ho, 2021)
    predicts   'score': u = w, score = grad w. 'eps': u = w / sigma, so that -grad w has unit scale at all times
    reference  add log N(x; 0, I) to u, which is log p_1 of a process that ends there: the network says what differs
    clock      t -> the label the network gets (default: t itself)

    Gradients are taken inside, also under no_grad; not under inference_mode. Rows of the network must not act on each
    other. Raises InputError for networks with piecewise linear activations, whose Laplacian is 0, and for other kinds.
    Source: Salimans & Ho, 2021, "Should EBMs model the energy or the score?".
    """

    def __init__(
        self, net: nn.Module, process: Any, predicts: str = "score", *, quadratic: bool = False,
        reference: bool = False, clock: Callable[[Any], Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if predicts not in ("score", "eps"):
            raise InputError(f"predicts = {predicts!r}: a potential's gradient is read as 'score' or 'eps'")
        if kinked := sorted({type(m).__name__ for m in net.modules() if isinstance(m, KINKED)}):
            raise InputError(
                f"{', '.join(kinked)} in a potential: its second derivatives are 0, use SiLU, Tanh or Softplus"
            )
        self.net, self.process, self.predicts, self.clock = net, process, predicts, clock
        self.quadratic, self.reference = quadratic, reference

    def potential(self, x: Tensor, t: Any) -> Tensor:
        """The scalar w(x, t) of the network, (B,)."""
        label = t if self.clock is None else self.clock(t)
        label = label.to(x) if isinstance(label, Tensor) else x.new_full((len(x),), label)
        out: Tensor = self.net(x, label)
        if self.quadratic:
            if out.shape != x.shape:
                raise InputError(
                    f"a quadratic potential needs a network from {tuple(x.shape)} to itself, not {tuple(out.shape)}"
                )
            return -0.5 * (x - out).flatten(1).square().sum(1)
        if out.numel() != len(x):
            raise InputError(f"a potential needs one number an item, the network gave {tuple(out.shape)}")
        return out.reshape(len(x))

    def log_density(self, x: Tensor, t: Any, ctx: Context | None = None) -> Tensor:
        """u(x, t), (B,): log p_t(x) up to a constant that may depend on t."""
        w = self.potential(x, t)
        u = w if self.predicts == "score" else w / self.process.coef(t).sigma
        return u - 0.5 * (x.flatten(1).square() + math.log(2 * math.pi)).sum(1) if self.reference else u

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        outside = torch.is_grad_enabled()
        with torch.enable_grad():
            y = x if outside and x.requires_grad else x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.potential(y, t).sum(), y, create_graph=outside)
        ctx.run.nfe += len(x) / ctx.batch
        coef, scores = self.process.coef(t), self.predicts == "score"
        native = slope if scores else -slope
        if self.reference:
            native = native - y if scores else linear(1.0, native, coef.sigma, y)
        return Posterior(native, self.predicts, x, coef)
