"""Compress an image into a small Gaussian code: the first stage of latent diffusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core import Context, Frozen, InputError, Loss, Objective
from sfumato.networks import perceptual_distance


class Autoencoding(Objective):
    """Reconstruction + perceptual + KL (+ adversarial) loss of a Gaussian autoencoder.

    L = |x - D(z)| + perceptual d(x, D(z)) + kl KL(q(z | x) || N(0, I)) / pixels + adversarial w (-mean C(D(z))), where
    z ~ q(z | x) and |.| is a mean over elements; d compares features of ``perceptual_by`` (frozen) by
    :func:`sfumato.networks.perceptual_distance`; the critic C learns the hinge loss
    (mean relu(1 - C(x)) + mean relu(1 + C(D(z)))) / 2. w = clip(|g_rec| / (|g_adv| + 1e-4), 0, 1e4), the norms of the
    gradients at ``codec.last_layer``, keeps the adversarial gradient as large as the reconstruction's. The critic takes
    part from iteration ``begin`` on.

    pixels   'l1', or 'charbonnier': sqrt(d^2 + 1e-6) (Charbonnier et al. 1994), smooth where the error d vanishes

    A batch is {"x": images in [-1, 1] (B, C, H, W)}. Players 'codec' and, with a critic, 'critic'. All but w are means over
    items: with a critic each micro-batch has a weight of its own. ``codec`` has encode(x) -> moments (sample, kl),
    decode(z) and, with a critic, last_layer: see :class:`sfumato.networks.AutoencoderKL`.
    Sources: Rombach, Blattmann, Lorenz, Esser, Ommer, 2022, "High-Resolution Image Synthesis with Latent Diffusion
    Models"; Esser, Rombach, Ommer, 2021, "Taming Transformers for High-Resolution Image Synthesis".
    """

    def __init__(
        self,
        codec: nn.Module,
        *,
        perceptual_by: nn.Module | None = None,
        perceptual: float = 0.5,
        kl: float = 1e-4,
        critic: nn.Module | None = None,
        adversarial: float = 0.5,
        begin: int = 0,
        pixels: str = "l1",
    ) -> None:
        super().__init__()
        if pixels not in ("l1", "charbonnier"):
            raise InputError(f"pixels = {pixels!r}: use 'l1' or 'charbonnier'")
        if min(perceptual, kl, adversarial, begin) < 0:
            raise InputError("the weights perceptual, kl and adversarial and the iteration begin are at least 0")
        if critic is not None and not hasattr(codec, "last_layer"):
            raise InputError(f"{type(codec).__name__} has no last_layer, where a critic's gradient is balanced")
        self.codec, self.critic = codec, critic
        self.perceptual_by = None if perceptual_by is None else Frozen(perceptual_by)
        self.perceptual, self.kl, self.adversarial, self.begin = perceptual, kl, adversarial, begin
        self.pixels = pixels

    def players(self) -> Mapping[str, nn.Module]:
        return {"codec": self.codec} if self.critic is None else {"codec": self.codec, "critic": self.critic}

    def turns(self, it: int) -> Sequence[Sequence[str]]:
        return [["codec"]] if self.critic is None or it < self.begin else [["codec"], ["critic"]]

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "codec") -> Loss:
        if "x" not in batch:
            raise InputError(f"Autoencoding reads batch['x'], the images; the batch has {sorted(batch)}")
        x = batch["x"]
        if ctx.rng is None:
            raise InputError("the code is drawn: give a context with streams, Context.of(batch, seed)")
        with torch.set_grad_enabled(player == "codec" and torch.is_grad_enabled()):
            moments = self.codec.encode(x)  # type: ignore[operator]
            y = self.codec.decode(moments.sample(ctx.rng.normal(moments.mean)))  # type: ignore[operator]
        return self._reconstruction(x, y, moments, ctx) if player == "codec" else self._hinge(x, y)

    def _reconstruction(self, x: Tensor, y: Tensor, moments: Any, ctx: Context) -> Loss:
        difference = x - y
        pixels = difference.abs().mean() if self.pixels == "l1" else (difference.square() + 1e-6).sqrt().mean()
        kl = moments.kl().mean() / x[0].numel()
        terms = {"pixels": pixels.detach(), "kl": kl.detach()}
        total = pixels + self.kl * kl
        if self.perceptual_by is not None:
            distance = perceptual_distance(self.perceptual_by, x, y).mean()
            terms["perceptual"] = distance.detach()
            total = total + self.perceptual * distance
        if self.critic is not None and ctx.run.step >= self.begin:
            fool = -self.critic(y).mean()
            weight = self._balance(total, fool) if torch.is_grad_enabled() else 0.0
            terms["fool"] = fool.detach()
            total = total + self.adversarial * weight * fool
        return Loss(total, terms)

    def _balance(self, loss: Tensor, fool: Tensor) -> Tensor:
        last: Any = self.codec.last_layer
        (ours,) = torch.autograd.grad(loss, last, retain_graph=True)
        (theirs,) = torch.autograd.grad(fool, last, retain_graph=True)
        return (ours.norm() / (theirs.norm() + 1e-4)).clamp(0, 1e4).detach()

    def _hinge(self, x: Tensor, y: Tensor) -> Loss:
        assert self.critic is not None
        loss = 0.5 * (F.relu(1 - self.critic(x)).mean() + F.relu(1 + self.critic(y.detach())).mean())
        return Loss(loss, {"critic": loss.detach()})
