"""How the bundled emoji models were made: ``sfumato zoo make NAME`` runs these, resuming where it was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import codecs, networks
from sfumato.core import mix
from sfumato.denoisers import Parametrized, parametrized
from sfumato.networks import UNet
from sfumato.objectives import Autoencoding, Contrastive, Denoising, LogitNormal
from sfumato.processes import Cosine, Flow
from sfumato.training import Trainer
from sfumato.zoo import captions, emoji
from sfumato.zoo.encoders import load_encoder

VENDORS = len(emoji.VENDORS)
TEXT_NULL = {"text": 0.0, "text_mask": False, "vector": 0.0, "vendor": VENDORS}
DROPOUT = {"text+text_mask+vector": 0.1, "vendor": 0.1}
SKIN_TONE_WEIGHT = 0.35  # five near-copies of a concept should not outweigh it


class EmojiBatches:
    """Iteration i -> a batch of emoji with one of their texts and their vendor: a pure function of (seed, i).

    ``data`` (N, *) are the images as the network sees them; ``std`` (N, *) goes beside them for latents.
    """

    def __init__(
        self, items: emoji.EmojiSet, data: Tensor, size: int, seed: int = 0, std: Tensor | None = None
    ) -> None:
        self.items, self.data, self.size, self.seed, self.std = items, data, size, seed, std
        self.bank = captions.bank(items)
        toned = torch.tensor([items.concepts[c].tone is not None for c in items.concept.tolist()])
        self.weights = torch.where(toned, SKIN_TONE_WEIGHT, 1.0)

    def rows(self, i: int) -> Tensor:
        """Which items are in batch i: drawn without replacement, toned variants less often."""
        generator = torch.Generator().manual_seed(mix(self.seed, i, 2) & 0xFFFFFFFF)
        return torch.multinomial(self.weights, self.size, replacement=False, generator=generator)

    def __call__(self, i: int) -> Mapping[str, Any]:
        generator = torch.Generator().manual_seed(mix(self.seed, i) & 0xFFFFFFFF)
        rows = self.rows(i)
        cond = self.bank.conditions(self.bank.choose(rows, generator)) | {"vendor": self.items.vendor[rows]}
        batch: dict[str, Any] = {"x": self._floats(self.data[rows]), "cond": cond}
        if self.std is not None:
            batch["std"] = self.std[rows].float()
        return batch

    def _floats(self, x: Tensor) -> Tensor:
        return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()


def pixel_denoiser() -> Parametrized:
    """The text- and vendor-conditional U-Net of ``emoji-pixel``, untrained."""
    torch.manual_seed(0)
    net = UNet(
        3, width=64, multipliers=(1, 2, 2), blocks=(2, 2, 1), patch=2, embedding_width=128, head="conditioned",
        context_channels=384, vector_channels=384, embeddings={"vendor": VENDORS},
    )  # fmt: skip
    return parametrized(net, Cosine(), "v", null=TEXT_NULL)


def make_pixel(out: Path, steps: int = 9_000, batch: int = 64) -> Trainer:
    """Train ``emoji-pixel``: 32-pixel emoji, v-prediction on the cosine process."""
    items = emoji.load(32, split="train")
    objective = Denoising(pixel_denoiser(), dropout=DROPOUT)
    return Trainer(
        objective, EmojiBatches(items, items.images, batch), steps=steps, out=out, lr=5e-4, betas=(0.9, 0.99), warmup=200,
        decay="tail", ema=0.9995, clip=1.0, save_every=250, log_every=50, config={"model": "emoji-pixel", "batch": batch},
    )  # fmt: skip


class EncoderBatches(EmojiBatches):
    """Emoji, a text and the labels of each, with random shifts, shading and noise, for the dual encoders."""

    def __call__(self, i: int) -> Mapping[str, Any]:
        batch = super().__call__(i)
        generator = torch.Generator().manual_seed(mix(self.seed, i, 1) & 0xFFFFFFFF)
        text = {"vector": batch["cond"]["vector"]}
        rows = self.rows(i)
        labels = {
            "concept": self.items.concept[rows],
            "vendor": self.items.vendor[rows],
            "category": self.items.category[rows],
        }
        return {"x": augment(batch["x"], generator), "text": text, **labels}


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 2 pixels on white, scale brightness and contrast by up to 10 %, add noise of std up to 0.1."""
    n, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), value=1.0)
    shifts = torch.randint(0, 5, (n, 2), generator=generator).tolist()
    x = torch.stack([p[:, a : a + height, b : b + width] for p, (a, b) in zip(padded, shifts, strict=True)])
    u = torch.rand(n, 3, 1, 1, generator=generator)
    noise = torch.randn(x.shape, generator=generator) * 0.1 * u[:, 2:]
    return x * (0.9 + 0.2 * u[:, :1]) + 0.2 * (u[:, 1:2] - 0.5) + noise


def encoder_network(seed: int, image: str) -> nn.Module:
    """A dual encoder for 32-pixel emoji: 'conv-encoder' or 'vit-encoder' for images, a small tower for sentences."""
    torch.manual_seed(seed)
    images = {
        "conv-encoder": {"width": 32, "multipliers": [1, 2, 4], "blocks": 2, "embedding": 128, "patch": 2},
        "vit-encoder": {"size": 32, "patch": 4, "width": 128, "depth": 5, "heads": 4, "embedding": 128},
    }
    tower = {"name": "text-tower", "config": {"width": 192, "context_channels": None, "embedding": 128}}
    classes = {"vendor": VENDORS, "category": 10}
    return networks.build(
        "dual-encoder", {"image": {"name": image, "config": images[image]}, "text": tower, "classes": classes}
    )


def make_encoder(out: Path, steps: int = 1500, batch: int = 192, seed: int = 0, image: str = "conv-encoder") -> Trainer:
    """Train ``emoji-encoder`` (for guidance, perceptual losses and alignment)."""
    items = emoji.load(32, split="train")
    objective = Contrastive(encoder_network(seed, image), classes={"vendor": 0.2, "category": 0.2})
    return Trainer(
        objective, EncoderBatches(items, items.images, batch, seed), steps=steps, out=out, lr=1e-3, weight_decay=0.05,
        warmup=200, decay="cosine", ema=0.998, clip=1.0, save_every=250, seed=seed, config={"image": image, "batch": batch},
    )  # fmt: skip


def make_judge(out: Path, steps: int = 2000, batch: int = 192) -> Trainer:
    """Train ``emoji-judge``: another architecture and another seed, used only to evaluate."""
    return make_encoder(out, steps, batch, seed=1, image="vit-encoder")


def autoencoder() -> nn.Module:
    """The Gaussian autoencoder of ``emoji-latent``: 64 x 64 x 3 -> 8 x 8 x 4."""
    torch.manual_seed(0)
    return networks.AutoencoderKL(channels=3, latent=4, factor=8, width=40)


def make_autoencoder(out: Path, steps: int = 2600, batch: int = 32) -> Trainer:
    """Train the codec of ``emoji-latent`` with the emoji encoder's features as perceptual distance."""
    items = emoji.load(64, split="train")
    objective = Autoencoding(autoencoder(), perceptual_by=load_encoder("emoji-encoder"), perceptual=0.2, kl=1e-4)
    return Trainer(
        objective, EmojiBatches(items, items.images, batch), steps=steps, out=out, lr=5e-4, betas=(0.9, 0.99), warmup=200,
        ema=0.999, clip=1.0, channels_last=True, save_every=250, config={"model": "emoji-autoencoder", "batch": batch},
    )  # fmt: skip


@torch.no_grad()
def encoded(codec: codecs.KL, images: Tensor, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Mean and std of the codes of uint8 images, in the codec's own scale: (N, 4, 8, 8) each, half precision."""
    means, stds = [], []
    for part in images.split(batch):
        moments = codec.autoencoder.encode(codecs.to_float(part))
        means.append(((moments.mean - codec.mean) / codec.std).half())
        stds.append(((0.5 * moments.logvar).exp() / codec.std).half())
    return torch.cat(means), torch.cat(stds)


def latent_codec(run: Path) -> codecs.KL:
    """The trained autoencoder as a codec whose codes have std 1 on the training images."""
    trainer = make_autoencoder(run)
    trainer.load()
    return codecs.KL(trainer.averaged()["codec"]).eval().fit_scale(emoji.load(64, split="train").images[::4])


def latent_denoiser() -> Parametrized:
    """The text- and vendor-conditional transformer of ``emoji-latent``, untrained."""
    torch.manual_seed(0)
    net = networks.DiT(
        4, size=8, patch=1, width=192, depth=8, heads=3, mlp_ratio=3, modulation="shared",
        context_channels=384, vector_channels=384, embeddings={"vendor": VENDORS},
    )  # fmt: skip
    return parametrized(net, Flow(), "flow", null=TEXT_NULL)


def make_latent(out: Path, steps: int = 30_000, batch: int = 64) -> Trainer:
    """Train ``emoji-latent``: flow matching on 8 x 8 x 4 codes of 64-pixel emoji, which are encoded once."""
    items = emoji.load(64, split="train")
    mean, std = encoded(latent_codec(out.parent / "emoji-autoencoder"), items.images)
    objective = Denoising(latent_denoiser(), times=LogitNormal(), dropout=DROPOUT)
    return Trainer(
        objective, EmojiBatches(items, mean, batch, std=std), steps=steps, out=out, lr=6e-4, betas=(0.9, 0.99), warmup=200,
        ema=0.9995, clip=1.0, save_every=250, config={"model": "emoji-latent", "batch": batch},
    )  # fmt: skip
