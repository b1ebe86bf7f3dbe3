"""How the models of the study of compression were made: ``sfumato zoo make emoji-study-f4`` and its fellows.

One U-Net, taught on the codes of autoencoders of factor f = 1 (pixels), 2, 4 and 8 of 32-pixel emoji, with the same number
of multiply-adds for each f. The codec of factor f comes first: ``sfumato zoo make emoji-study-codec-f4`` in a folder beside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import codecs, networks
from sfumato.core import Context, InputError
from sfumato.denoisers import Parametrized, parametrized
from sfumato.objectives import Autoencoding, Denoising
from sfumato.pipeline import Pipeline
from sfumato.processes import DDPM
from sfumato.training import Trainer
from sfumato.training.data import Arrays, Batches
from sfumato.zoo import emoji
from sfumato.zoo.encoders import load_encoder
from sfumato.zoo.make_emoji import encoded

SIZE, CLASSES = 32, 10
FACTORS = (1, 2, 4, 8)
LATENT = 4
BUDGET = 1e12  # multiply-adds a training, a backward pass counted as two forward ones
BATCH = {1: 16, 2: 16, 4: 32, 8: 64}  # small ones: at this length steps count for more than their noise
WIDTHS = {2: (1,), 4: (1, 2), 8: (1, 2, 2)}
TEXT_NULL = {"text": 0.0, "text_mask": False}


def conditions(category: Tensor) -> dict[str, Tensor]:
    """Categories (N,) as the one token that cross-attention reads: one-hot, so its projection is a learnt vector a class."""
    text = F.one_hot(category, CLASSES)[:, None].float()
    return {"text": text, "text_mask": torch.ones(len(text), 1, dtype=torch.bool)}


def multiply_adds(call: Callable[[], Any]) -> float:
    """Multiply-adds of the products and convolutions in a call, counted."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 2


def denoiser(factor: int) -> Parametrized:
    """The class-conditional U-Net that predicts eps on codes of this factor, untrained: the same but for its channels."""
    torch.manual_seed(0)
    net = networks.UNet(
        3 if factor == 1 else LATENT, width=16, multipliers=(1, 2, 4), blocks=1, attention=(False, False, True), heads=2,
        context_channels=CLASSES, embedding_width=64, head="conditioned",
    )  # fmt: skip
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    return parametrized(net, DDPM(betas), "eps", null=TEXT_NULL)


def evaluation(model: Parametrized, factor: int) -> float:
    """Multiply-adds of the denoiser for one image."""
    x, side = torch.zeros(1, 3 if factor == 1 else LATENT, SIZE // factor, SIZE // factor), torch.zeros(1).long()
    return multiply_adds(lambda: model(x, 0.5, Context(cond=conditions(side), batch=1)))


def make_codec(out: Path, steps: int = 600, batch: int = 32, *, factor: int) -> Trainer:
    """Train the codec of this factor: L1 and the features of the emoji encoder, a weak pull towards N(0, 1)."""
    if factor not in WIDTHS:
        raise InputError(f"factor = {factor}: one of {', '.join(map(str, WIDTHS))}")
    torch.manual_seed(0)
    net = networks.AutoencoderKL(channels=3, latent=LATENT, factor=factor, width=32, multipliers=WIDTHS[factor])
    objective = Autoencoding(net, perceptual_by=load_encoder("emoji-encoder"), perceptual=0.2, kl=1e-4)
    data = Batches(Arrays({"x": emoji.load(SIZE, split="train").images}), batch)
    return Trainer(
        objective, data, steps=steps, out=out, lr=1e-3, betas=(0.9, 0.99), warmup=50, decay="cosine", ema=0.99, clip=1.0,
        channels_last=True, save_every=200, config={"model": f"emoji-study-codec-f{factor}", "batch": batch},
    )  # fmt: skip


def codec(run: Path, factor: int) -> codecs.Codec:
    """Pixels, or the codec of this factor whose training is in a folder beside ``run``, at the scale of its codes."""
    if factor == 1:
        return codecs.Identity()
    trainer = make_codec(run.parent / f"emoji-study-codec-f{factor}", factor=factor)
    trainer.load()
    return codecs.KL(trainer.averaged()["codec"]).eval().fit_scale(emoji.load(SIZE, split="train").images)


def make_denoiser(out: Path, steps: int | None = None, *, factor: int) -> Trainer:
    """Train the denoiser on codes of this factor for the common number of multiply-adds."""
    items, model, batch = emoji.load(SIZE, split="train"), denoiser(factor), BATCH[factor]
    fields = {"x": items.images, **conditions(items.category)}
    if factor > 1:
        fields["x"], fields["std"] = encoded(codec(out, factor), items.images)  # type: ignore[arg-type]
    steps = round(BUDGET / (3 * evaluation(model, factor) * batch)) if steps is None else steps
    return Trainer(
        Denoising(model, dropout={"text+text_mask": 0.1}), Batches(Arrays(fields), batch, cond=("text", "text_mask")),
        steps=steps, out=out, lr=2e-3, betas=(0.9, 0.99), warmup=50, decay="cosine", ema=0.99, clip=1.0, save_every=500,
        config={"model": f"emoji-study-f{factor}", "batch": batch},
    )  # fmt: skip


def bundle(player: Parametrized, facts: dict[str, Any], run: Path, factor: int) -> Pipeline:
    """The pipeline that is bundled as ``emoji-study/fN``. It draws without a class; the recipe gives `conditions`."""
    facts = {**facts, "multiply-adds": {"training": BUDGET, "an evaluation": evaluation(player, factor)}}
    return Pipeline(
        player, codec(run, factor), size=(SIZE, SIZE), solver="ddim", grid="uniform", steps=50, card=facts
    )  # fmt: skip


MAKERS: dict[str, Callable[..., Trainer]] = {
    **{f"emoji-study-codec-f{f}": partial(make_codec, factor=f) for f in WIDTHS},
    **{f"emoji-study-f{f}": partial(make_denoiser, factor=f) for f in FACTORS},
}
