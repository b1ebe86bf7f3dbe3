"""Gates on the blocks, heads and channel groups of a transformer, and the smaller network that closed gates leave."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, InputError, rebuild
from sfumato.core.context import Tap
from sfumato.denoisers import Parametrized
from sfumato.denoisers.features import network
from sfumato.networks import DiT

PARTS = ("attention", "cross", "mlp")


@dataclass(frozen=True)
class Structure:
    """What can be taken out of a network, in the order of a code's numbers: the widths of each block, then one a block.

    widths  of each block, by part: how many heads ('attention', 'cross') or channel groups ('mlp') it has
    work    multiplications of one head or group, by part, for one item
    base    multiplications of an item that are in no gate
    """

    widths: tuple[Mapping[str, int], ...]
    work: Mapping[str, float]
    base: float

    @property
    def size(self) -> int:
        """How many gates there are."""
        return sum(sum(block.values()) for block in self.widths) + len(self.widths)

    def split(self, gates: Tensor) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Gates (..., size) as those of each block by part (..., n), and of the blocks (..., depth)."""
        blocks, at = [], 0
        for block in self.widths:
            found = {}
            for part, n in block.items():
                found[part] = gates[..., at : at + n]
                at += n
            blocks.append(found)
        return blocks, gates[..., at:]

    @property
    def total(self) -> float:
        """Multiplications of an item with all gates open."""
        return self.base + sum(self.work[p] * n for block in self.widths for p, n in block.items())

    def gated(self, gates: Tensor) -> Tensor:
        """The share of the gated work that gates keep (...,)."""
        blocks, depth = self.split(gates)
        each = [sum(self.work[p] * g.sum(-1) for p, g in block.items()) for block in blocks]
        return (torch.stack(each, -1) * depth).sum(-1) / (self.total - self.base)  # type: ignore[arg-type]

    def cost(self, gates: Tensor) -> Tensor:
        """Multiplications that open gates cost, over those of all open (...,): 1 where nothing is closed."""
        return (self.base + (self.total - self.base) * self.gated(gates)) / self.total


def structure(denoiser: Any, shape: Sequence[int], tokens: int = 0, group: int = 32) -> Structure:
    """The gates of the DiT inside a denoiser, for states of ``shape`` (C, H, W) and ``tokens`` text tokens (the null included).

    group  channels of a gate of the MLP. Only sfumato's DiT is known; InputError for other networks.
    """
    net = network(denoiser) if isinstance(denoiser, Denoiser) else denoiser
    if not isinstance(net, DiT):
        raise InputError(f"gates are known for a DiT, not for a {type(net).__name__}: prune that by hand")
    n = shape[1] * shape[2] // net.patch**2
    widths: list[dict[str, int]] = []
    blocks: Any = net.blocks
    for block in blocks:
        hidden: int = block.mlp.out.in_features
        if hidden % group:
            raise InputError(f"an MLP of {hidden} channels is not in groups of {group}")
        heads = {part: getattr(block, part).heads for part in PARTS[:2] if getattr(block, part) is not None}
        widths.append({**heads, "mlp": hidden // group})
    first: Any = net.blocks[0]
    wide, head = first.mlp.gate.in_features, net.head
    work = {"attention": 4.0 * n * wide * head + 2 * n * n * head, "mlp": 3.0 * n * wide * group}
    if first.cross is not None:
        told = first.cross.key.in_features
        work["cross"] = 2.0 * n * wide * head + 2 * tokens * told * head + 2 * n * tokens * head
    return Structure(tuple(widths), work, _base(net, n, tokens))


def _base(net: DiT, n: int, tokens: int) -> float:
    """Multiplications of an item outside the gated parts."""
    wide = net.input.out_features
    vectors = sum(m.weight.numel() for p, m in net.named_modules() if isinstance(m, nn.Linear) and p.split(".")[0] in ("conditioning", "modulation"))  # fmt: skip
    vectors += sum(m.weight.numel() for p, m in net.named_modules() if isinstance(m, nn.Linear) and p.endswith("modulation.project"))  # fmt: skip
    context = 0 if net.context is None else net.context.project.weight.numel() * max(tokens - 1, 0)
    final = net.final.modulation.weight.numel() + n * net.final.project.weight.numel()
    return float(n * net.input.in_features * wide + vectors + context + final)


def gating(structure: Structure, gates: Tensor) -> list[tuple[str, Tap]]:
    """Taps that multiply heads and groups of each item by its gates (B, size), and pass by blocks: out = (1 - g) x + g block(x).

    With all gates 1 the network is unchanged, with gradients towards gates between. Where guidance stacks several readings
    of the B items, each stack has the same gates.
    """
    blocks, depth = structure.split(gates)
    taps: list[tuple[str, Tap]] = []
    for i, block in enumerate(blocks):
        taps += [(f"blocks.{i}.{part}.out", _scaled(g)) for part, g in block.items()]
        taps.append((f"blocks.{i}", _passed(depth[..., i])))
    return taps


def _rows(gates: Tensor, x: Tensor) -> Tensor:
    """Gates (B, n) for the rows of x, which are B or several times B."""
    if len(x) % len(gates):
        raise InputError(f"gates of {len(gates)} items for {len(x)} rows")
    return gates.to(x.dtype).repeat(len(x) // len(gates), *[1] * (gates.ndim - 1))


def _scaled(gates: Tensor) -> Tap:
    def around(ctx: Context, call: Any, x: Tensor) -> Any:
        each = _rows(gates, x)
        return call(x * each.repeat_interleave(x.shape[-1] // each.shape[-1], -1)[:, None])

    return around


def _passed(gate: Tensor) -> Tap:
    def around(ctx: Context, call: Any, x: Tensor, *args: Any) -> Any:
        g = _rows(gate[:, None], x)[:, :, None]
        return x + g * (call(x, *args) - x)

    return around


@torch.no_grad()
def materialize(denoiser: Any, structure: Structure, gates: Tensor) -> Any:
    """A denoiser whose network lacks what hard gates (size,) of 0 and 1 close: the gated one's function, with its cost.

    Tensors that do not shrink are shared; ``denoiser`` is untouched. InputError for other gates, and where a part of an open
    block has none left.
    """
    if gates.shape != (structure.size,) or not bool(((gates == 0) | (gates == 1)).all()):
        raise InputError(f"gates {tuple(gates.shape)}: ({structure.size},) numbers 0 or 1 are wanted")
    net = network(denoiser)
    new: Any = rebuild(net, lambda path, m: None)
    blocks, depth = structure.split(gates > 0)
    for i, parts in enumerate(blocks):
        if not bool(depth[i]):
            continue
        for part, kept in parts.items():
            if not bool(kept.any()):
                raise InputError(f"block {i} keeps nothing of its {part}: close the whole block, or keep one")
            module: Any = getattr(new.blocks[i], part)
            rows = kept.repeat_interleave(module.out.in_features // len(kept)).nonzero().flatten()
            inner = ("gate", "up") if part == "mlp" else ("query", "key", "value")
            for name in inner:
                setattr(module, name, _cut(getattr(module, name), rows, 0))
            module.out = _cut(module.out, rows, 1)
            if part != "mlp":
                module.heads = int(kept.sum())
    new.blocks = nn.ModuleList(block for block, open_ in zip(new.blocks, depth.tolist(), strict=True) if open_)
    made: Any = rebuild(denoiser, lambda path, m: None)
    for module in made.modules():
        if isinstance(module, Parametrized):
            module.net, module._graph = new, []
    return made


def _cut(layer: Any, rows: Tensor, dim: int) -> Any:
    """A linear layer with these outputs (dim 0) or inputs (dim 1) alone."""
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    new.weight = nn.Parameter(layer.weight.index_select(dim, rows), requires_grad=layer.weight.requires_grad)
    if dim == 0:
        new.out_features = len(rows)
        new.bias = (
            None if layer.bias is None else nn.Parameter(layer.bias[rows], requires_grad=layer.bias.requires_grad)
        )
    else:
        new.in_features = len(rows)
    return new


def by_magnitude(denoiser: Any, structure: Structure, target: float) -> Tensor:
    """Hard gates (size,) that close the heads and groups of least weight norm until the cost is at most ``target``.

    Each part keeps one; blocks stay. The norm of a head or group is that of its columns of the output layer times its rows
    of the value or up layer.
    """
    net: Any = network(denoiser)
    scores: list[Tensor] = []
    for block, parts in zip(net.blocks, structure.widths, strict=True):
        for part, n in parts.items():
            module = getattr(block, part)
            source = module.up if part == "mlp" else module.value
            score = module.out.weight.unflatten(1, (n, -1)).square().sum((0, 2)).sqrt() * source.weight.unflatten(0, (n, -1)).square().sum((1, 2)).sqrt()  # fmt: skip
            score = score / structure.work[part]
            scores.append(torch.where(score == score.max(), torch.inf, score))
    order = torch.cat(scores).detach().argsort()
    gates = torch.ones(structure.size)
    for i in order.tolist():
        if float(structure.cost(gates)) <= target:
            return gates
        gates[i] = 0.0 if torch.cat(scores)[i] < torch.inf else 1.0
    if float(structure.cost(gates)) > target:
        raise InputError(f"a cost of {target:g} cannot be reached with one head and group a part: give a higher target")
    return gates


__all__ = ["Structure", "by_magnitude", "gating", "materialize", "structure"]
