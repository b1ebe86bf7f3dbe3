"""Gates on the blocks, heads and channel groups of a network, and the smaller network that closed gates leave."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.acceleration.counting import operations
from sfumato.acceleration.parts import Part, Site, sites
from sfumato.core import Context, Denoiser, InputError, rebuild
from sfumato.core.context import Tap
from sfumato.denoisers import Parametrized
from sfumato.denoisers.features import network


@dataclass(frozen=True)
class Structure:
    """What can be taken out of a network, in the order of a code's numbers: the widths of each block, then one a block.

    sites   the blocks and their parts
    widths  of each block, by part: how many heads ('attention', 'cross') or channel groups ('mlp', 'channels') it has
    work    multiplications of one head or group, by block and part, for one item
    base    multiplications of an item that are in no gate
    """

    sites: tuple[Site, ...]
    widths: tuple[Mapping[str, int], ...]
    work: tuple[Mapping[str, float], ...]
    base: float

    @property
    def size(self) -> int:
        """How many gates there are."""
        return sum(sum(block.values()) for block in self.widths) + len(self.widths)

    @property
    def whole(self) -> Tensor:
        """Which blocks can be passed by (depth,): not those whose output is of another form than their input."""
        return torch.tensor([site.whole for site in self.sites])

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
        each = zip(self.widths, self.work, strict=True)
        return self.base + sum(work[p] * n for block, work in each for p, n in block.items())

    def gated(self, gates: Tensor) -> Tensor:
        """The share of the gated work that gates keep (...,)."""
        blocks, depth = self.split(gates)
        each = [sum(work[p] * g.sum(-1) for p, g in block.items()) for block, work in zip(blocks, self.work, strict=True)]  # fmt: skip
        return (torch.stack(each, -1) * depth).sum(-1) / (self.total - self.base)  # type: ignore[arg-type]

    def cost(self, gates: Tensor) -> Tensor:
        """Multiplications that open gates cost, over those of all open (...,): 1 where nothing is closed."""
        return (self.base + (self.total - self.base) * self.gated(gates)) / self.total


def structure(
    denoiser: Denoiser, shape: Sequence[int], cond: Mapping[str, Any] | None = None, group: int = 32
) -> Structure:
    """The gates of the network inside a denoiser, for states of ``shape`` (C, H, W), and what each costs, counted in one call.

    cond   conditions of an item as the network will read them, (1 or more, *): work depends on how many text tokens there are
    group  channels of a gate of an MLP

    See :func:`sfumato.acceleration.parts.sites` for the networks that are known; InputError for others.
    """
    net, leaf = network(denoiser), next(m for m in denoiser.modules() if isinstance(m, Parametrized))
    found = tuple(sites(net, group))
    parts = [part for site in found for part in site.parts]
    seen: dict[str, int] = {}

    def tap(path: str) -> Tap:
        def around(ctx: Context, call: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = call(x, *args, **kwargs)
            seen[path] = out.shape[2:].numel() if out.ndim == 4 else out.shape[:-1].numel()
            return out

        return around

    layers = sorted({path for part in parts for path in (part.out, *(row for row, _ in part.rows))})
    told = {name: value[:1] for name, value in (cond or {}).items()}
    first = next((p for p in net.parameters()), torch.zeros(1))
    x = torch.zeros(1, *shape, dtype=first.dtype, device=first.device)
    ctx = Context(cond=told, batch=1, taps=tuple((path, tap(path)) for path in layers))
    with torch.no_grad():
        total = operations(lambda: leaf(x, 0.5, ctx)) / 2
    missing = sorted(set(layers) - set(seen))
    if missing:
        raise InputError(f"a call never reaches {missing[0]}: give the conditions that the network reads, cond=")
    work = tuple({part.name: _work(net, part, seen) for part in site.parts} for site in found)
    widths = tuple({part.name: part.groups for part in site.parts} for site in found)
    gated = sum(w[p] * n for w, block in zip(work, widths, strict=True) for p, n in block.items())
    return Structure(found, widths, work, total - gated)


def _work(net: nn.Module, part: Part, seen: Mapping[str, int]) -> float:
    """Multiplications of one head or group: its share of the layers that make and read it, and of the products of attention."""
    out: Any = net.get_submodule(part.out)
    total = seen[part.out] * out.weight.numel()
    for path, _ in part.rows:
        layer: Any = net.get_submodule(path)
        total += seen[path] * layer.weight.numel()
    if part.heads is not None:  # queries times keys, and probabilities times values
        total += 2 * seen[part.out] * seen[part.rows[-1][0]] * out.weight.shape[1]
    return total / part.groups


def gating(structure: Structure, gates: Tensor) -> list[tuple[str, Tap]]:
    """Taps that multiply heads and groups of each item by its gates (B, size), and pass by blocks: out = (1 - g) x + g block(x).

    With all gates 1 the network is unchanged, with gradients towards gates between. Where guidance stacks several readings
    of the B items, each stack has the same gates.
    """
    blocks, depth = structure.split(gates)
    taps: list[tuple[str, Tap]] = []
    for i, (site, block) in enumerate(zip(structure.sites, blocks, strict=True)):
        taps += [(part.out, _scaled(block[part.name])) for part in site.parts]
        taps += [(site.path, _passed(depth[..., i]))] if site.whole else []
    return taps


def _rows(gates: Tensor, x: Tensor) -> Tensor:
    """Gates (B, n) for the rows of x, which are B or several times B."""
    if len(x) % len(gates):
        raise InputError(f"gates of {len(gates)} items for {len(x)} rows")
    return gates.to(x.dtype).repeat(len(x) // len(gates), *[1] * (gates.ndim - 1))


def _scaled(gates: Tensor) -> Tap:
    def around(ctx: Context, call: Any, x: Tensor, *args: Any) -> Any:
        each, maps = _rows(gates, x), x.ndim == 4
        channels = each.repeat_interleave(x.shape[1 if maps else -1] // each.shape[-1], -1)
        return call(x * (channels[:, :, None, None] if maps else channels[:, None]), *args)

    return around


def _passed(gate: Tensor) -> Tap:
    def around(ctx: Context, call: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        g = _rows(gate, x).view(-1, *[1] * (x.ndim - 1))
        return x + g * (call(x, *args, **kwargs) - x)

    return around


class Passed(nn.Module):
    """In the place of a block that was taken out: its input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


@torch.no_grad()
def materialize(denoiser: Any, structure: Structure, gates: Tensor) -> Any:
    """A denoiser whose network lacks what hard gates (size,) of 0 and 1 close: the gated one's function, with its cost.

    Tensors that do not shrink are shared; ``denoiser`` is untouched. InputError for other gates, where a part of an open
    block has none left, and where a block is closed that cannot be passed by.
    """
    if gates.shape != (structure.size,) or not bool(((gates == 0) | (gates == 1)).all()):
        raise InputError(f"gates {tuple(gates.shape)}: ({structure.size},) numbers 0 or 1 are wanted")
    new: Any = rebuild(network(denoiser), lambda path, m: None)
    blocks, depth = structure.split(gates > 0)
    for site, parts, stays in zip(structure.sites, blocks, depth.tolist(), strict=True):
        if not stays:
            if not site.whole:
                raise InputError(
                    f"{site.path} gives another form than it gets: it cannot be left out, leave its gate open"
                )
            _put(new, site.path, Passed())
            continue
        for part in site.parts:
            if not bool(parts[part.name].any()):
                raise InputError(f"{site.path} keeps nothing of its {part.name}: close the whole block, or keep one")
            _shrink(new, part, parts[part.name])
    made: Any = rebuild(denoiser, lambda path, m: None)
    for module in made.modules():
        if isinstance(module, Parametrized):
            module.net, module._graph = new, []
    return made


def _put(net: nn.Module, path: str, module: nn.Module) -> None:
    """A submodule in the place of another."""
    owner, _, leaf = path.rpartition(".")
    net.get_submodule(owner)._modules[leaf] = module


def _shrink(net: nn.Module, part: Part, kept: Tensor) -> None:
    """Cut a part of the network down to the groups that are kept."""
    out: Any = net.get_submodule(part.out)
    channels = out.weight.shape[1]
    rows = kept.repeat_interleave(channels // len(kept)).nonzero().flatten()
    for path, times in part.rows:
        layer: Any = net.get_submodule(path)
        _put(net, path, _cut(layer, torch.cat([rows + k * channels for k in range(times)]), 0))
    _put(net, part.out, _cut(out, rows, 1))
    if part.heads is not None:
        owner: Any = net.get_submodule(part.heads)
        owner.heads = int(kept.sum())
    if part.norm is not None:
        norm: Any = copy.copy(net.get_submodule(part.norm))
        norm._parameters = {
            name: value if value is None else nn.Parameter(value.index_select(0, rows), requires_grad=value.requires_grad)
            for name, value in norm._parameters.items()
        }  # fmt: skip
        norm.num_groups, norm.num_channels = int(kept.sum()), len(rows)
        _put(net, part.norm, norm)


def _cut(layer: Any, rows: Tensor, dim: int) -> Any:
    """A linear layer or convolution with these outputs (dim 0) or inputs (dim 1) alone."""
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    new.weight = nn.Parameter(layer.weight.index_select(dim, rows), requires_grad=layer.weight.requires_grad)
    kind = "features" if isinstance(layer, nn.Linear) else "channels"
    setattr(new, f"{'out' if dim == 0 else 'in'}_{kind}", len(rows))
    if dim == 0 and layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.index_select(0, rows), requires_grad=layer.bias.requires_grad)
    return new


def by_magnitude(denoiser: Any, structure: Structure, target: float) -> Tensor:
    """Gates (size,) that close the heads and groups of least norm for their work until the cost is at most ``target``.

    Each part keeps one; blocks stay. The norm of a head or group is that of its columns of the layer that reads it times its
    rows of the last layer that makes it.
    """
    net = network(denoiser)
    scores: list[Tensor] = []
    for site, work in zip(structure.sites, structure.work, strict=True):
        for part in site.parts:
            reads, makes = _weight(net, part.out), _weight(net, part.rows[-1][0])
            source = makes.unflatten(0, (part.rows[-1][1], part.groups, -1)).square().sum((0, 2, 3, 4)).sqrt()
            score = reads.unflatten(1, (part.groups, -1)).square().sum((0, 2, 3)).sqrt() * source / work[part.name]
            scores.append(torch.where(score == score.max(), torch.inf, score))
    found = torch.cat(scores).detach()
    gates = torch.ones(structure.size)
    for i in found.argsort().tolist():
        if float(structure.cost(gates)) <= target:
            return gates
        gates[i] = 0.0 if found[i] < torch.inf else 1.0
    if float(structure.cost(gates)) > target:
        raise InputError(f"a cost of {target:g} cannot be reached with one head and group a part: give a higher target")
    return gates


def _weight(net: nn.Module, path: str) -> Tensor:
    """A layer's weight as (out, in, the rest)."""
    layer: Any = net.get_submodule(path)
    return layer.weight.flatten(2) if layer.weight.ndim > 2 else layer.weight[:, :, None]  # type: ignore[no-any-return]


__all__ = ["Passed", "Structure", "by_magnitude", "gating", "materialize", "structure"]
