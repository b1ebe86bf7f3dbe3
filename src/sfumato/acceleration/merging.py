"""Token merging: tokens that are alike are averaged before a part of a transformer block and put back after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.acceleration._registry import register
from sfumato.core import Context, Denoiser, Guidance, InputError, Streams, Wrapper, first, mix
from sfumato.core.context import Tap
from sfumato.denoisers.features import network
from sfumato.networks.dit import Block, flat, pick
from sfumato.networks.layers import Attention, ImageAttention

PARTS = ("attention", "cross", "mlp")
DRAW = 0x70E  # which draw of (seed, step) the destinations are


class Site(NamedTuple):
    """A block of self-attention, and the paths of its parts below the network, by the names of ``PARTS``."""

    block: str
    parts: dict[str, str]


class Matching(NamedTuple):
    """Which tokens go on, and which of those stands for each of the N.

    kept   (B, K) indices into the N tokens
    place  (B, N) indices into the K
    share  (B, K, 1), 1 over the number of tokens that a kept one stands for
    """

    kept: Tensor
    place: Tensor
    share: Tensor

    def merge(self, x: Tensor, prune: bool = False) -> Tensor:
        """(B, N, C) to (B, K, C): means of what stands together, or only the kept ones."""
        if prune:
            return pick(x, self.kept)
        rows, kept = self.kept.shape
        total = x.new_zeros(rows * kept, x.shape[2]).index_add(0, flat(self.place, kept), x.flatten(0, 1))
        return total.view(rows, kept, -1) * self.share.to(x.dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, K, C) to (B, N, C): each token gets what stands for it."""
        return pick(y, self.place)

    def rotary(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Positions (N, d) of the kept tokens: (B, 1, K, d)."""
        cos, sin = rotary
        return cos[self.kept][:, None], sin[self.kept][:, None]


def match(x: Tensor, destinations: Tensor, count: int) -> Matching:
    """Bipartite soft matching: ``count`` of the other tokens join the destination that is most like them (cosine).

    x             (B, N, C), what likeness is measured on
    destinations  (B, D) distinct indices that are never merged away; count <= N - D
    The tokens with the largest likeness join. Source: Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, 2023, "Token Merging:
    Your ViT But Faster".
    """
    rows, n, _ = x.shape
    unit = F.normalize(x.detach().float(), dim=2)
    taken = torch.zeros(rows, n, dtype=torch.int64, device=x.device).scatter(1, destinations, 1)
    sources = taken.argsort(dim=1, stable=True)[:, : n - destinations.shape[1]]
    likeness, best = (pick(unit, sources) @ pick(unit, destinations).mT).max(2)
    order = likeness.argsort(dim=1, descending=True, stable=True)
    joining, staying = (sources.gather(1, part) for part in order.tensor_split([count], 1))
    kept = torch.cat([staying, destinations], 1)
    at = torch.arange(kept.shape[1], device=x.device).expand(rows, -1)
    place = torch.zeros(rows, n, dtype=torch.int64, device=x.device).scatter(1, kept, at)
    place = place.scatter(1, joining, staying.shape[1] + best.gather(1, order[:, :count]))
    share = torch.zeros(kept.shape, device=x.device).scatter_add(1, place, torch.ones(rows, n, device=x.device))
    return Matching(kept, place, 1 / share[:, :, None])


class Merged(Wrapper):
    """See :func:`token_merging`."""

    def __init__(
        self,
        inner: Denoiser,
        ratio: float,
        parts: Sequence[str],
        stride: int,
        random: bool,
        prune: bool,
        least: int,
        spare: int | None,
    ) -> None:
        super().__init__(inner)
        self.ratio, self.parts, self.stride = ratio, frozenset(parts), stride
        self.random, self.prune, self.least = random, prune, least
        self.sites = sites(network(inner))
        self.spare = spared(self.sites) if spare is None else spare
        if not 0 <= self.spare < len(self.sites):
            raise InputError(
                f"spare = {spare}: this network has {len(self.sites)} blocks, and one must be left to merge in"
            )

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        if not self.ratio:
            return self.inner(x, t, ctx)
        if self.random and ctx.rng is None:
            raise InputError("destinations='random' draws from the run's streams, and this run has none: use 'regular'")
        found: dict[str, Matching] = {}  # of this call: nothing is left on the network
        size = tuple(first(x).shape[-2:])
        taps: list[tuple[str, Tap]] = []
        for k, site in enumerate(self.sites):
            if k < self.spare:
                continue
            taps.append((site.block, self._matching(found, k, site.block, size)))
            taps += [(path, self._part(found, site.block)) for name, path in site.parts.items() if name in self.parts]
        return self.inner(x, t, ctx.fork(taps=taps))

    def _matching(self, found: dict[str, Matching], k: int, block: str, size: tuple[int, int]) -> Tap:
        def around(ctx: Context, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else next(iter(kwargs.values()))
            is_map = given.ndim == 4
            tokens = given.flatten(2).mT if is_map else given
            grid = tuple(given.shape[-2:]) if is_map else grid_of(tokens.shape[1], size)
            count = math.floor(self.ratio * tokens.shape[1])
            if count and tokens.shape[1] >= self.least and min(grid) >= self.stride:
                found[block] = match(tokens, self._destinations(ctx, len(tokens), grid, k).to(tokens.device), count)
            try:
                return call(*args, **kwargs)
            finally:
                found.pop(block, None)

        return around

    def _part(self, found: dict[str, Matching], block: str) -> Tap:
        def around(ctx: Context, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
            matching = found.get(block)
            if matching is None:
                return call(x, *args, **kwargs)
            if kwargs.get("rotary") is not None:
                kwargs["rotary"] = matching.rotary(kwargs["rotary"])
            return matching.unmerge(call(matching.merge(x, self.prune), *args, **kwargs))

        return around

    def _destinations(self, ctx: Context, rows: int, grid: tuple[int, int], k: int) -> Tensor:
        """(rows, D): one token of each stride x stride region, the first or the one drawn for this item, step and block."""
        high, wide = (side // self.stride for side in grid)
        index = torch.arange(grid[0] * grid[1]).view(grid)[: high * self.stride, : wide * self.stride].contiguous()
        regions = index.view(high, self.stride, wide, self.stride).transpose(1, 2).reshape(high * wide, -1)
        if not self.random or ctx.rng is None:
            return regions[:, 0].expand(rows, -1)
        if rows % len(ctx.rng.seeds):
            raise InputError(f"{rows} rows for {len(ctx.rng.seeds)} items: random destinations belong to whole items")
        streams = Streams(tuple((mix(seed, DRAW, k), i) for seed, i in ctx.rng.seeds), ctx.rng.step)
        drawn = streams.uniform(torch.empty(len(streams.seeds), len(regions), dtype=torch.float64))
        which = (drawn * regions.shape[1]).long()
        chosen = regions.expand(len(which), -1, -1).gather(2, which[:, :, None])[:, :, 0]
        return chosen.repeat(rows // len(chosen), 1)  # guidance stacks its readings of the items


def grid_of(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tokens of a state of that height and width: its sides over one whole number, rounded up."""
    for factor in range(1, max(size) + 1):
        grid = -(-size[0] // factor), -(-size[1] // factor)
        if grid[0] * grid[1] == tokens:
            return grid
    raise InputError(f"{tokens} tokens are no grid of a state of {size[0]} x {size[1]}: this network is not known")


def spared(found: Sequence[Site]) -> int:
    """How many blocks at the beginning are left alone: a quarter of a stack, none where blocks stand at several places."""
    return len(found) // 4 if len({site.block.rpartition(".")[0] for site in found}) == 1 else 0


def sites(net: nn.Module) -> list[Site]:
    """The self-attention blocks of a network, ours or of diffusers. InputError where there is none that is known."""
    found = list(_sites(net))
    if not found:
        raise InputError(
            f"{type(net).__name__} has no known block of self-attention: tokens are merged in sfumato's DiT and U-Net and in "
            "diffusers' BasicTransformerBlock (not in joint attention over text and image)"
        )
    return found


def _sites(net: nn.Module) -> Iterator[Site]:
    for path, module in net.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, (Block, ImageAttention)) and isinstance(module.attention, Attention):
            names = {name: name for name in PARTS if isinstance(getattr(module, name, None), nn.Module)}
        elif isinstance(getattr(module, "attn1", None), nn.Module) and hasattr(module, "ff"):
            theirs = {"attention": "attn1", "cross": "attn2", "mlp": "ff"}
            names = {ours: name for ours, name in theirs.items() if isinstance(getattr(module, name, None), nn.Module)}
        else:
            continue
        yield Site(path, {ours: prefix + name for ours, name in names.items()})


@register("token-merging")
def token_merging(
    ratio: float = 0.25,
    *,
    parts: Sequence[str] = ("attention",),
    stride: int = 2,
    destinations: str = "random",
    prune: bool = False,
    least: int = 0,
    spare: int | None = None,
) -> Guidance:
    """Merge the share ``ratio`` of the tokens of each block that are most like others; no training.

    One token of each ``stride`` x ``stride`` region is a destination. Of the others, ``ratio`` N join the destination most
    like them (:func:`match`, on the block's input): the mean goes through the parts of the block, and each token gets the
    result of what stands for it.

    ratio         0 (the network, bit for bit) to 1 - 1 / stride^2, where only destinations are left. 0.5 was published, for 4096
                  tokens; where there are tens of them each says more of its own, and 0.5 draws ragged edges
    parts         "attention" (self), "cross" and "mlp": what runs on the merged tokens
    destinations  "random": drawn anew at each step and block, a pure function of the item's seed; "regular": the first ones
    prune         leave out the tokens that join, instead of averaging them
    spare         blocks at the beginning that are left alone; None: a quarter of a transformer's (on emoji-latent its first two
                  blocks of eight, which place what is drawn, make two thirds of the error of merging in all), none of a U-Net's
    least         blocks with fewer tokens than this, or narrower than ``stride``, are left alone

    Knows sfumato's DiT and U-Net, and diffusers' BasicTransformerBlock. Composes with guidance on either side; the work
    saved is counted by :func:`sfumato.acceleration.operations`, the matching with it. Source: Bolya, Hoffman, 2023, "Token
    Merging for Fast Stable Diffusion". InputError for networks without such blocks.
    """
    if not (isinstance(stride, int) and stride >= 2):
        raise InputError(f"stride = {stride}: a whole number of at least 2")
    most = 1 - 1 / stride**2
    if not 0 <= ratio <= most:
        raise InputError(f"ratio = {ratio}: from 0 to {most:g}, since one token of {stride} x {stride} stays")
    if not parts or set(parts) - set(PARTS):
        raise InputError(f"parts = {tuple(parts)}: one or more of {', '.join(PARTS)}")
    if destinations not in ("random", "regular"):
        raise InputError(f"destinations = {destinations!r}: 'random' or 'regular'")
    return lambda inner: Merged(inner, ratio, parts, stride, destinations == "random", prune, least, spare)


__all__ = ["Matching", "Merged", "match", "token_merging"]
