"""Small emoji led to their degraded versions by a residual shift: data, a teacher, and what a restored picture is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import core, grids, solvers
from sfumato.core import Context, mix
from sfumato.denoisers import parametrized
from sfumato.evaluation.metrics import detail_error, psnr_each
from sfumato.networks import UNet
from sfumato.objectives import Denoising
from sfumato.processes import ResidualShift
from sfumato.recipes._emoji import Judge
from sfumato.recipes._small import learn
from sfumato.training.trajectories import Trajectories
from sfumato.zoo import emoji

SIZE, FACTOR, NOISE = 32, 4, 0.04
LAW = ResidualShift()


class Onto(torch.nn.Module):
    """image + net(x, label, image): a network that begins at the degraded picture, which it has to sharpen."""

    def __init__(self, net: UNet) -> None:
        super().__init__()
        self.net, self.accepts, self.bottleneck_path = net, net.accepts, f"net.{net.bottleneck_path}"

    def forward(self, x: Tensor, label: Tensor, image: Tensor) -> Tensor:
        return image + self.net(x, label, image=image)  # type: ignore[no-any-return]


def degraded(x: Tensor, seed: int) -> Tensor:
    """Blurred with (1, 2, 1) / 4, averaged over 4 x 4 pixels, noise of 0.04 added, and enlarged again by cubic interpolation."""
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line).expand(3, 1, 3, 3)
    small = F.avg_pool2d(F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), kernel, groups=3), FACTOR)
    small = small + NOISE * torch.randn(small.shape, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, scale_factor=FACTOR, mode="bicubic", align_corners=False).clamp(-1, 1)


@dataclass(frozen=True)
class Items:
    """Pictures in [-1, 1] and what is known of them."""

    x: Tensor
    y: Tensor

    @property
    def fields(self) -> dict[str, Tensor]:
        """What a training reads; the conditions are 'anchor' and 'image'."""
        return {"x": self.x, "anchor": self.y, "image": self.y}

    @property
    def cond(self) -> dict[str, Tensor]:
        """What a denoiser is told."""
        return {"anchor": self.y, "image": self.y}


class Bed:
    """Emoji of 32 pixels: those of known concepts to learn from, and n of concepts that none was taught."""

    def __init__(self, seed: int, n: int = 320) -> None:
        self.seed, self.judge = seed, Judge()
        self.seen = self._items("train", None, 1)
        self.unseen = self._items("unseen", n, 2)

    def _items(self, split: str, n: int | None, key: int) -> Items:
        x = emoji.load(SIZE, split=split, skin_tones=False).images.float() / 127.5 - 1
        if n is not None:
            x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(mix(self.seed, key) % 2**32))[:n]]
        return Items(x, degraded(x, mix(self.seed, key, 1) % 2**32))

    def teacher(self, steps: int) -> Any:
        """A residual-shift denoiser that predicts x0, taught here."""
        torch.manual_seed(mix(self.seed, 3) % 2**32)
        net = UNet(3, width=32, multipliers=(1, 2), blocks=1, attention=False, extra_channels=3, patch=2)
        objective = Denoising(parametrized(Onto(net), LAW, "x0"), dropout=0.0)
        options: dict[str, Any] = {"steps": steps, "size": 32, "cond": ("anchor", "image")}
        return learn(objective, self.seen.fields, mix(self.seed, 4), **options).requires_grad_(False)

    def pairs(self, teacher: Any, n: int) -> dict[str, Tensor]:
        """n learned pictures with the start and the end of the teacher's deterministic run on each."""
        rows = torch.randperm(len(self.seen.x), generator=torch.Generator().manual_seed(mix(self.seed, 5) % 2**32))[:n]
        some = Items(self.seen.x[rows], self.seen.y[rows])

        def told(index: Any) -> dict[str, Tensor]:
            return {k: v[list(index)] for k, v in some.cond.items()}

        runs = Trajectories(
            teacher, n, (3, SIZE, SIZE), conditions=told, solver="ddim", grid="uniform", steps=LAW.steps, keep="ends", seed=self.seed,
        )  # fmt: skip
        states = torch.cat([runs.batch(range(i, min(i + 64, n)))["states"] for i in range(0, n, 64)])
        return {**some.fields, "states": states}

    def restored(self, denoiser: Any, steps: int) -> Tensor:
        """The unseen pictures, from their degraded versions plus noise that no pair began with."""
        n = len(self.unseen.x)
        ctx = Context.of(n, mix(self.seed, 6), cond=self.unseen.cond)
        shape = tuple(self.unseen.x.shape)
        return core.sample(denoiser, solvers.get("ddim"), grids.get("uniform"), steps, shape=shape, ctx=ctx)  # type: ignore[no-any-return]

    def measured(self, x: Tensor) -> tuple[float, float, float]:
        """(mean PSNR in decibels, error of the log power of fine detail, Fréchet distance in the judge's features)."""
        x, truth = x.clamp(-1, 1), self.unseen.x
        pictures, true = (((v + 1) * 127.5).round().to(torch.uint8) for v in (x, truth))
        return (
            float(psnr_each(x, truth, data_range=2.0).mean()), detail_error(x, truth), self.judge.frechet(pictures, true),
        )  # fmt: skip


__all__ = ["FACTOR", "LAW", "SIZE", "Bed", "Items", "Onto", "degraded"]
