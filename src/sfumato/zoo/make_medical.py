"""How ``medical`` and its two rivals were made: ``sfumato zoo make medical``, about two minutes on one core; and
``medical-regressor`` and ``medical-autoencoder``, each on as many of the same patches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import codecs, networks, operators
from sfumato.core import Context, Loss, Objective
from sfumato.denoisers import Parametrized, parametrized
from sfumato.objectives import Denoising
from sfumato.operators import Operator
from sfumato.pipeline import Pipeline
from sfumato.processes import VP
from sfumato.training import Trainer
from sfumato.zoo.medical import SIDE, Patches

STEPS, BATCH = 2000, 32
NOISE = 0.02  # 1 % of the range of the images, [-1, 1]


def acquisition(acceleration: float = 4.0, seed: int = 0) -> Operator:
    """The measurement that the regressor was made for: vertical lines of the spectrum, 8 % of them at the centre."""
    return operators.get("fourier", acceleration=acceleration, centre=0.08, seed=seed, noise=NOISE)  # type: ignore[no-any-return]


class Regression(Objective):
    """min |net(f(x)) - x|^2 with f(x) = pinv(A x + noise), or x itself without an operator (an autoencoder). Player 'net'."""

    def __init__(self, net: nn.Module, operator: Operator | None = None) -> None:
        super().__init__()
        self.net, self.operator = net, operator

    def players(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "net") -> Loss:
        x: Tensor = batch["x"]
        seen = x if self.operator is None else self.operator.pinv(self.operator.measure(x, ctx))
        return Loss((self.net(seen, torch.zeros(len(x))) - x).square().mean())


def unet() -> networks.UNet:
    """The network of the denoiser and of the regressor, 0.5 million parameters, untrained."""
    torch.manual_seed(0)
    return networks.UNet(
        1, width=32, multipliers=(1, 2), blocks=1, attention=(False, True), heads=2, patch=2, head="conditioned"
    )


def autoencoder() -> networks.AutoencoderKL:
    """A patch of 1,024 pixels through 64 numbers, about as many parameters, untrained."""
    torch.manual_seed(0)
    return networks.AutoencoderKL(
        1, latent=4, factor=8, width=32, multipliers=(1, 2, 2), blocks=1, decoder_blocks=1, patch=2, attention=True
    )


def denoiser() -> Parametrized:
    """The network as a prediction of eps under VP."""
    return parametrized(unet(), VP(), "eps")


def _trainer(name: str, objective: Objective, out: Path, steps: int, batch: int) -> Trainer:
    return Trainer(
        objective, Patches("colin27", batch), steps=steps, out=out, lr=2e-3, warmup=100, decay="cosine", ema=0.998,
        channels_last=True, clip=1.0, save_every=500, config={"model": name, "batch": batch},
    )  # fmt: skip


def make_medical(out: Path, steps: int = STEPS, batch: int = BATCH) -> Trainer:
    """Train ``medical``: an unconditional denoiser of brain patches."""
    return _trainer("medical", Denoising(denoiser()), out, steps, batch)


def make_regressor(out: Path, steps: int = STEPS, batch: int = BATCH) -> Trainer:
    """Train ``medical-regressor``: patches from a quarter of the lines of their spectrum, one mask."""
    return _trainer("medical-regressor", Regression(unet(), acquisition()), out, steps, batch)


def make_autoencoder(out: Path, steps: int = STEPS, batch: int = BATCH) -> Trainer:
    """Train ``medical-autoencoder``: patches from themselves."""
    return _trainer("medical-autoencoder", Regression(autoencoder()), out, steps, batch)


def bundle(player: Parametrized, card: dict[str, Any]) -> Pipeline:
    """The pipeline that is bundled."""
    return Pipeline(player, codecs.Identity(1), size=(SIDE, SIDE), steps=50, card=card)
