"""Classifier guidance: a loss whose cost is -log p(y | x), and what makes an off-the-shelf classifier fit for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Guidance, InputError, rebuild
from sfumato.guidance.loss import loss
from sfumato.processes.base import sde


class ClassCost:
    """cost(x, cond[, t]) = log sum_c exp(tau_marginal f_c(x)) - tau_joint f_y(x), (B,): see :func:`classifier`."""

    def __init__(
        self, net: Callable[..., Tensor], label: str | int | Tensor, tau_joint: float = 1.0, tau_marginal: float = 1.0
    ) -> None:
        if not (tau_joint > 0 and tau_marginal >= 0):
            raise InputError(f"tau_joint = {tau_joint} and tau_marginal = {tau_marginal}: above 0, and not negative")
        if isinstance(net, nn.Module) and net.training:
            raise InputError(
                "the classifier is in training mode, so items would depend on their batch: call net.eval()"
            )
        self.net, self.label, self.tau_joint, self.tau_marginal = net, label, tau_joint, tau_marginal

    def __call__(self, x: Tensor, cond: Mapping[str, Any], *time: Any) -> Tensor:
        logits = self.net(x, *time)
        label = self.labels(cond, len(x)).to(logits.device)
        _check(logits, label, len(x))
        joint = logits.gather(1, label[:, None]).squeeze(1)
        return (self.tau_marginal * logits).logsumexp(1) - self.tau_joint * joint

    def labels(self, cond: Mapping[str, Any], n: int) -> Tensor:
        """The wanted classes, int64 (n,)."""
        if isinstance(self.label, str) and self.label not in cond:
            raise InputError(
                f"no condition {self.label!r} says the class; there are: {', '.join(sorted(cond)) or 'none'}"
            )
        label = torch.as_tensor(cond[self.label] if isinstance(self.label, str) else self.label)
        if label.is_floating_point() or label.is_complex() or label.ndim > 1 or (label.ndim and len(label) != n):
            raise InputError(f"classes are integers, one or {n} of them, not {label.dtype} {tuple(label.shape)}")
        return label.long().expand(n)


def _check(logits: Tensor, label: Tensor, n: int) -> None:
    """InputError for what are no logits (n, classes), or for labels beyond their classes."""
    if logits.ndim != 2 or len(logits) != n:
        raise InputError(f"a classifier gives logits ({n}, classes), not {tuple(logits.shape)}")
    if (
        logits.device.type != "cpu"
    ):  # elsewhere a look at the values would wait for the device, whose gather checks itself
        return
    if not 0 <= int(label.min()) <= int(label.max()) < logits.shape[1]:
        raise InputError(f"classes {sorted(set(label.tolist()))}: 0 to {logits.shape[1] - 1} with these logits")
    said = logits.detach()
    if said.min() >= 0 and logits.shape[1] > 1 and ((said.sum(1) - 1).abs() < 1e-4).all():
        raise InputError("the classifier gives probabilities: temperatures need its logits, or the logarithms of those")


def classifier(
    net: Callable[..., Tensor],
    scale: float | Callable[[Any], Any] = 1.0,
    *,
    label: str | int | Tensor = "y",
    through: str = "belief",
    tau_joint: float = 1.0,
    tau_marginal: float = 1.0,
    **options: Any,
) -> Guidance:
    """Raise log p(y | x) = tau_joint f_y(x) - log sum_c exp(tau_marginal f_c(x)), f the logits of a classifier.

    net           (B, *) -> logits (B, classes), in eval mode; with through='state' (x_t, t) -> logits, of noisy states
    scale         a number or a function of t (:func:`half_sine`); 1 is Bayes' rule
    label         the wanted class: the name of a condition, an integer, or a tensor (B,)
    through       'state' is Dhariwal & Nichol's and exact where the logits know the time; 'belief' shows a clean
                  classifier E[x0 | x_t] and skips the network; 'network' differentiates through it
    tau_joint, tau_marginal   1 and 1 is the conditional log-likelihood; tau_marginal = 0 raises the joint f_y alone
    options       of :func:`sfumato.guidance.loss`: interval, weight, keep, codec, normalise, limit, data_std

    EluCD is ``classifier(smooth_activations(net, 3.0), half_sine(1.0, 0.3), tau_marginal=0.5, weight='tweedie')`` around a
    denoiser that is conditional already. The released code adds (S + 0.3 S_max sin(pi t)) grad to the mean of a DDPM step of
    variance S; a move of x0 by sigma_s^2 / alpha_s grad is S grad exactly, and the weight here is that of t instead of s.
    Sources: Dhariwal, Nichol, 2021, "Diffusion Models Beat GANs on Image Synthesis"; Ma, Hu, Wang, Sun, 2024, "Elucidating
    the Design Space of Classifier-Guided Diffusion Generation".
    """
    return loss(ClassCost(net, label, tau_joint, tau_marginal), scale, through=through, **options)


def half_sine(scale: float = 1.0, sine: float = 0.3, process: Any = None) -> Callable[[Any], Any]:
    """t -> scale (1 + sine sin(pi t)): more guidance in the middle of the way.

    With a ``process`` the bump is sin(pi t) g(1)^2 / g(t)^2, g the diffusion of its equation: in units of the largest
    variance of a step, as in EluCD's released code. That needs alpha > 0 at t = 1 (VP, VE, EDM).
    """
    top = 1.0 if process is None else sde(process, 1.0)[1]

    def at(t: Any) -> Any:
        bump = torch.sin(math.pi * t) if isinstance(t, Tensor) else math.sin(math.pi * t)
        ratio = 1.0 if process is None else top / sde(process, t)[1]
        return scale * (1 + sine * ratio * bump)

    return at


def smooth_activations(net: nn.Module, beta: float = 3.0) -> nn.Module:
    """The same network with every ReLU replaced by softplus(beta u) / beta; tensors are shared, ``net`` is untouched.

    The gradient of a ReLU network in its input is piecewise constant; this one is smooth, and beta -> infinity is ReLU again.
    Raises InputError where there is no ``nn.ReLU`` (``torch.relu`` in a forward cannot be replaced).
    """
    if not beta > 0:
        raise InputError(f"beta = {beta}: positive; infinity would be ReLU itself")
    if not any(isinstance(m, nn.ReLU) for m in net.modules()):
        raise InputError("this network has no nn.ReLU module to smooth")
    if isinstance(net, nn.ReLU):
        return nn.Softplus(beta)
    return rebuild(net, lambda path, m: nn.Softplus(beta).train(m.training) if isinstance(m, nn.ReLU) else None)


__all__ = ["ClassCost", "classifier", "half_sine", "smooth_activations"]
