"""Scenes of a known number of emoji, a text-to-image model of them taught in seconds, and counters of what it draws."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core import mix
from sfumato.denoisers import parametrized
from sfumato.networks import ConvEncoder, UNet
from sfumato.objectives import Denoising
from sfumato.processes import Flow
from sfumato.recipes._small import learn

KINDS = ("red heart", "blue circle", "star", "green apple")
COUNTS = ("one", "two", "three", "four", "five", "six")
SIZES = {"small": 5, "large": 7}  # pixels
WORDS = (*COUNTS, "some", "hearts", "circles", "stars", "apples", *SIZES, "a", "picture", "of", "the")
NOUNS = ("hearts", "circles", "stars", "apples")
CELL, SIDE, CHANNELS, LENGTH = 8, 24, 24, 7


class Scenes(NamedTuple):
    """x (N, 3, 24, 24) in [-1, 1]; number, kind and large (N,); centres (N, 1, 24, 24), 1 in the middle of each drawing."""

    x: Tensor
    number: Tensor
    kind: Tensor
    large: Tensor
    centres: Tensor


@cache
def _sprites(size: int) -> Tensor:
    """The four drawings, (4, 3, size, size)."""
    from sfumato.zoo import emoji

    drawn = emoji.load(64, vendors=("twemoji",), split="all", skin_tones=False)
    chosen = drawn.images[[drawn.captions.index(kind) for kind in KINDS]].float() / 127.5 - 1
    return F.interpolate(chosen, (size, size), mode="bilinear", antialias=True)


@cache
def _cells(kind: int, size: int) -> tuple[Tensor, Tensor]:
    """A drawing at each place of a cell of 8 pixels, (P, 3, 8, 8), and its centre, (P, 1, 8, 8)."""
    places = [(i, j) for i in range(CELL - size) for j in range(CELL - size)]
    cells, dots = torch.ones(len(places), 3, CELL, CELL), torch.zeros(len(places), 1, CELL, CELL)
    for k, (i, j) in enumerate(places):
        cells[k, :, i : i + size, j : j + size] = _sprites(size)[kind]
        dots[k, 0, i + size // 2, j + size // 2] = 1
    return cells, dots


def scenes(n: int, seed: int, size: str | None = None, least: int = 1, most: int = 6) -> Scenes:
    """n scenes: ``least`` to ``most`` drawings of one kind and size in a grid of nine cells, each moved inside its cell."""
    draw = torch.Generator().manual_seed(mix(seed, 11))
    count, kind = (torch.randint(*span, (n,), generator=draw) for span in ((least, most + 1), (0, 4)))
    large = torch.rand(n, generator=draw) < (0.5 if size is None else float(size == "large"))
    used = torch.rand(n, 9, generator=draw).argsort(1) < count[:, None]
    cells, dots = torch.ones(n, 9, 3, CELL, CELL), torch.zeros(n, 9, 1, CELL, CELL)
    for k in range(len(KINDS)):
        for name, side in SIZES.items():
            rows = (kind == k) & (large == (name == "large"))
            pictures, centres = _cells(k, side)
            which = torch.randint(len(pictures), (int(rows.sum()), 9), generator=draw)
            inside = used[rows][..., None, None, None]
            cells[rows] = torch.where(inside, pictures[which], cells[rows])
            dots[rows] = torch.where(inside, centres[which], dots[rows])
    return Scenes(_grid(cells), count, kind, large, _grid(dots))


def _grid(cells: Tensor) -> Tensor:
    n, _, channels = cells.shape[:3]
    return cells.view(n, 3, 3, channels, CELL, CELL).permute(0, 3, 1, 4, 2, 5).reshape(n, channels, SIDE, SIDE)


@cache
def table() -> Tensor:
    """A fixed vector of each word, (V, 24), entries N(0, 1); number words also lie along a line, as in language models."""
    words = torch.randn(len(WORDS), CHANNELS, generator=torch.Generator().manual_seed(7))
    line = (
        torch.linspace(-1.5, 1.5, len(COUNTS))[:, None]
        * words[len(COUNTS)]
        * words.new_tensor([1.0, -1.0]).repeat(CHANNELS // 2)
    )
    words[: len(COUNTS)] = 0.5 * words[: len(COUNTS)] + line
    return words


def prompts(texts: Sequence[str]) -> dict[str, Tensor]:
    """Conditions of prompts of known words: text (B, 7, 24) and text_mask (B, 7)."""
    text, mask = torch.zeros(len(texts), LENGTH, CHANNELS), torch.zeros(len(texts), LENGTH, dtype=torch.bool)
    for i, words in enumerate(given.split() for given in texts):
        text[i, : len(words)] = table()[[WORDS.index(word) for word in words]]
        mask[i, : len(words)] = True
    return {"text": text, "text_mask": mask}


def captions(data: Scenes, seed: int) -> list[str]:
    """What a careless writer says of them: the number is left out of 60 %, and up to two off in the others."""
    draw, out = torch.Generator().manual_seed(mix(seed, 12)), []
    vague, off = torch.rand(len(data.x), generator=draw) < 0.6, torch.randint(-2, 3, (len(data.x),), generator=draw)
    opening = torch.randint(4, (len(data.x),), generator=draw)
    for i in range(len(data.x)):
        number = "some" if vague[i] else COUNTS[int((data.number[i] - 1 + off[i]).clamp(0, 5))]
        size = "large" if data.large[i] else "small"
        out.append(
            ("", "a picture of ", "picture of the ", "the ")[opening[i]] + f"{number} {size} {NOUNS[data.kind[i]]}"
        )
    return out


def generator(seed: int, steps: int = 350) -> Any:
    """A rectified-flow U-Net that reads those captions."""
    data = scenes(8192, seed)
    torch.manual_seed(mix(seed, 13) % 2**31)
    net = UNet(3, width=32, multipliers=(1, 2), blocks=1, attention=(True, True), heads=2, context_channels=CHANNELS, patch=4,
               head="conditioned")  # fmt: skip
    denoiser = parametrized(net, Flow(), "flow", null={"text": 0.0, "text_mask": False})
    fields = {"x": data.x, **prompts(captions(data, seed))}
    taught = learn(Denoising(denoiser), fields, seed, steps=steps, size=64, lr=3e-3, cond=("text", "text_mask"))
    return taught.eval().requires_grad_(False)


class Density(nn.Module):
    """x (B, 3, 24, 24) -> density (B, 1, 24, 24), not negative."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.net(x))


def taught(
    net: nn.Module, loss: Any, data: Scenes, seed: int, steps: int, lr: float = 3e-3, size: int = 64
) -> nn.Module:
    """The network after these steps of AdamW on slightly noisy scenes."""
    draw = torch.Generator().manual_seed(mix(seed, 14))
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(data.x), (size,), generator=draw)
            x = data.x[rows] + 0.1 * torch.randn(size, *data.x.shape[1:], generator=draw)
            optimizer.zero_grad()
            loss(net(x), rows).backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def density(seed: int, steps: int = 200) -> tuple[nn.Module, float]:
    """A differentiable counter taught on small drawings only (Gaussian dots of std 1), and what its map sums to an object there."""
    data = scenes(2048, mix(seed, 1), "small", 0, 9)
    blob = torch.exp(-torch.arange(-3.0, 4.0).square() / 2)
    kernel = (blob[:, None] * blob / (blob.sum() ** 2))[None, None]
    aim = F.conv2d(data.centres, kernel, padding=3)
    torch.manual_seed(mix(seed, 2) % 2**31)
    net = taught(Density(16), lambda out, rows: (out - aim[rows] * 60).square().mean(), data, seed, steps)
    with torch.no_grad():
        return net, float(net(data.x).sum() / data.number.sum())


class Reader(nn.Module):
    """x -> logits of the count (0 to 9) and of the kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = ConvEncoder(3, width, (1, 2), embedding=14, patch=2, normalise=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x).split((10, 4), 1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def count(self, x: Tensor) -> Tensor:
        """How many it sees, (B,)."""
        return self(x)[0].argmax(1)

    @torch.no_grad()
    def kind(self, x: Tensor) -> Tensor:
        """Which, (B,)."""
        return self(x)[1].argmax(1)


def reader(seed: int, width: int = 24, steps: int = 250) -> Any:
    """A classifier of counts and kinds, of all sizes; another seed or width is another one."""
    data = scenes(4096, mix(seed, 3, width), None, 0, 9)
    torch.manual_seed(mix(seed, 4, width) % 2**31)

    def loss(out: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        seen = data.number[rows] > 0
        return F.cross_entropy(out[0], data.number[rows]) + F.cross_entropy(out[1][seen], data.kind[rows][seen])

    return taught(Reader(width), loss, data, seed, steps)


def components(x: Tensor, upscale: int = 1, area: int = 5) -> Tensor:
    """Connected regions of ink of at least ``area`` pixels, (B,): a detector without gradients."""
    from scipy import ndimage

    x = F.interpolate(x, scale_factor=upscale, mode="bilinear") if upscale > 1 else x
    out = []
    for picture in (x.clamp(-1, 1).amin(1) < 0.4).numpy():
        labels, n = ndimage.label(picture)
        out.append(sum(int(v >= area * upscale**2) for v in ndimage.sum_labels(picture, labels, range(1, n + 1))))
    return torch.tensor(out)
