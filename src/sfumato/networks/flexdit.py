"""A diffusion transformer most of whose layers run on few tokens, the fewer the more noise there is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.base import register
from sfumato.networks.dit import DiT, Embedded, Rotary, rotary_at
from sfumato.networks.layers import zero
from sfumato.networks.products import Linear


class Pooled(nn.Module):
    """out(value(mean of the tokens)), (B, 1, width): attention with equal weights, at the cost of one token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.out = Linear(width, width), Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        return self.out(self.value(x.mean(1, keepdim=True)))


class Join(nn.Module):
    """up(sparse, nearest on the dense grid) + keep(dense): the dense tokens at the start, or with ``open`` their sum."""

    def __init__(self, width: int, open: bool = False) -> None:
        super().__init__()
        self.up, self.keep = zero(Linear(width, width, bias=False)), Linear(width, width, bias=False)
        for layer in (self.up, self.keep) if open else (self.keep,):
            nn.init.eye_(layer.weight)

    def forward(self, sparse: Tensor, dense: Tensor, small: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        cells = self.up(sparse).mT.unflatten(2, small)
        return F.interpolate(cells, size=grid, mode="nearest").flatten(2).mT + self.keep(dense)


@register("flexdit")
class FlexDiT(DiT):
    """A `DiT` in three parts: `pooling` blocks with a mean in the place of attention, sparse-dense modules, `dense` blocks.

    A module (merge, sparse, recover, dense) pools the grid to s x s tokens z, then has so many blocks of
      merge    z attends to the dense tokens y
      sparse   an ordinary block on z
      recover  u attends to z, where u = W_1 up(z) + W_2 y (see `join`)
      dense    an ordinary block on u
    and hands u on. Each block has the parts of a DiT's, and its cross-attention to text, so that `inherit` fills it with the
    layer of a trained DiT at its depth.

    join    "copy": as published, W_1 = 0 and W_2 = 1 at the start, so that what the sparse layers make has to be learnt;
            "change": u = W_1 up(z - pooled y) + W_2 y with W_1 = W_2 = 1 at the start. What the sparse layers add to their
            tokens is then added to the dense ones: a network that inherits all its layers, and pools none of them, is the
            one it inherits from where s is the side of the grid, and near it where the tokens of a cell are alike
    levels  s for a picture of `size`, from most noise to least; other sizes have as large a share of their grid
    bounds  the labels, falling, at which the next level begins; by default equal parts of [0, 1]. A pure function of an
            item's label: items of one batch are run level by level and do not depend on each other. With several levels the
            values of the label are read at each call (not on the meta device)

    Other arguments, conditions and taps are those of `DiT`, but `depth`, which is the sum of the layout, and `active`. The
    grid need not be a multiple of s: cells of the pooling then overlap, and those of the upsampling differ in size. The
    dependence on time is not in the released code; here it is a step function. Source: Chang, Wang, Tang, Yang, 2024,
    "FlexDiT: Dynamic Token Density Control for Diffusion Transformer" (also: SparseDiT).
    """

    def __init__(
        self,
        channels: int,
        *,
        pooling: int = 1,
        modules: Sequence[Sequence[int]] = ((1, 2, 1, 1),),
        dense: int = 1,
        join: str = "copy",
        levels: Sequence[int] = (4,),
        bounds: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        layout = [tuple(module) for module in modules]
        if pooling < 0 or dense < 0 or any(len(m) != 4 or min(m) < 0 or not sum(m) for m in layout):
            raise InputError(
                f"pooling = {pooling}, modules = {layout}, dense = {dense}: not negative, and a module is four numbers of blocks "
                "(merge, sparse, recover, dense)"
            )
        if join not in ("copy", "change"):
            raise InputError(f"join = {join!r}: 'copy' or 'change'")
        if "depth" in options:
            raise InputError("depth follows from the layout: pooling + the modules + dense")
        super().__init__(channels, depth=pooling + sum(map(sum, layout)) + dense, **options)
        width, side = self.input.out_features, self.size // self.patch
        bounds = [1 - (k + 1) / len(levels) for k in range(len(levels) - 1)] if bounds is None else list(bounds)
        if not levels or not all(1 <= s <= side for s in levels):
            raise InputError(f"levels = {tuple(levels)}: sides of a token grid, from 1 to {side}")
        if len(bounds) != len(levels) - 1 or sorted(bounds, reverse=True) != bounds:
            raise InputError(f"bounds = {tuple(bounds)}: {len(levels) - 1} falling labels, one between two levels")
        self.pooling, self.layout, self.levels, self.bounds = pooling, layout, tuple(levels), tuple(bounds)
        for block in self.blocks[:pooling]:
            block.attention = Pooled(width)
        self.changes = join == "change"
        self.joins = nn.ModuleList(Join(width, self.changes) for _ in layout)
        self.accepts = self.accepts - {"active"}

    @classmethod
    def like(cls, dit: DiT, **layout: Any) -> FlexDiT:
        """One of that width, those heads, conditions and so on; not yet with its weights: `inherit`."""
        config: Mapping[str, Any] = dit.config  # type: ignore[assignment]
        return cls(**{key: value for key, value in config.items() if key != "depth"}, **layout)

    def forward(self, x: Tensor, label: Tensor, **cond: Tensor | None) -> Tensor:
        e = self.embed(x, label, **cond)
        for block in self.blocks[: self.pooling]:
            e = e._replace(tokens=block(e.tokens, e.shared, e.context, e.rotary))
        if len(self.levels) == 1:
            return self.image(self._upper(e, self.levels[0]), e.grid)
        level = (label.double()[:, None] < label.new_tensor(self.bounds, dtype=torch.float64)).sum(1)
        rows = [(level == k).nonzero()[:, 0] for k in range(len(self.levels))]
        found = [self._upper(e.rows(r), s) for r, s in zip(rows, self.levels, strict=True) if len(r)]
        return self.image(torch.cat(found)[torch.cat(rows).argsort()], e.grid)

    def _upper(self, e: Embedded, level: int) -> Tensor:
        """Everything above the pooling blocks, with s = level."""
        side, blocks, y = self.size // self.patch, iter(self.blocks[self.pooling :]), e.tokens
        small = _scaled(e.grid[0], level, side), _scaled(e.grid[1], level, side)
        rows, columns = (
            F.adaptive_avg_pool1d(torch.arange(n, device=y.device, dtype=torch.float32)[None], s)[0]
            for n, s in zip(e.grid, small, strict=True)
        )
        sparse = rotary_at(rows, columns, self.head, y)
        for (merge, few, recover, dense), join in zip(self.layout, self.joins, strict=True):
            z = pooled = F.adaptive_avg_pool2d(y.mT.unflatten(2, e.grid), small).flatten(2).mT
            for _ in range(merge):
                z = next(blocks)(z, e.shared, e.context, sparse, y, e.rotary)
            for _ in range(few):
                z = next(blocks)(z, e.shared, e.context, sparse)
            y = join(z - pooled if self.changes else z, y, small, e.grid)
            for _ in range(recover):
                y = next(blocks)(y, e.shared, e.context, e.rotary, z, sparse)
            for _ in range(dense):
                y = next(blocks)(y, e.shared, e.context, e.rotary)
        for block in blocks:
            y = block(y, e.shared, e.context, e.rotary)
        return self.final(y, e.condition)


def _scaled(n: int, level: int, side: int) -> int:
    return max(1, math.floor(n * level / side + 0.5))


def inherit(net: DiT, dit: DiT) -> DiT:
    """Copy a trained DiT's weights into `net`, layer by layer in the order of depth, and return `net`.

    A FlexDiT has as many layers as it; its pooling blocks take value and output of the attention, and what a DiT does not
    have stays as it is. A DiT with fewer layers takes evenly chosen ones, the first and the last among them. Raises
    InputError where layers or widths do not agree.
    """
    ours, theirs = len(net.blocks), len(dit.blocks)
    if ours > theirs or (isinstance(net, FlexDiT) and ours != theirs):
        raise InputError(
            f"{ours} layers cannot inherit from {theirs}: a FlexDiT's pooling, modules and dense must add up to them"
        )
    layer = {str(i): str(round(i * (theirs - 1) / max(1, ours - 1))) for i in range(ours)}
    given, weights = dit.state_dict(), net.state_dict()
    for name, value in weights.items():
        kind, _, rest = name.partition(".")
        number, _, part = rest.partition(".")
        source = f"blocks.{layer[number]}.{part}" if kind == "blocks" else name
        if kind == "joins":
            continue
        if source not in given or given[source].shape != value.shape:
            found = tuple(given[source].shape) if source in given else "nothing"
            raise InputError(f"{name} is {tuple(value.shape)} and inherits {found}: use FlexDiT.like(dit, ...)")
        weights[name] = given[source]
    net.load_state_dict(weights)
    return net


__all__ = ["FlexDiT", "Join", "Pooled", "inherit"]
