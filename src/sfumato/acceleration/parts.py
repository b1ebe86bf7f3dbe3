"""What can be taken out of a network: heads, groups of channels and whole blocks, found by the kinds of block it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from sfumato.core import InputError
from sfumato.networks.dit import Block
from sfumato.networks.layers import Attention, ImageAttention, ResidualBlock


class Part(NamedTuple):
    """Channels inside a block, in ``groups`` equal groups that are kept or left out.

    name   'attention' | 'cross' | 'mlp' | 'channels'
    out    the layer that reads them: its inputs are gated, and cut
    rows   the layers that make them, (path, how many times over their outputs hold the channels): outputs are cut; the last
           is the one whose norm counts
    heads  the attention whose ``heads`` they are
    norm   the group normalisation between, a group a gate
    """

    name: str
    out: str
    groups: int
    rows: tuple[tuple[str, int], ...]
    heads: str | None = None
    norm: str | None = None


class Site(NamedTuple):
    """A block: its path, its parts, and whether it can be passed by as a whole (its output is of the form of its input)."""

    path: str
    parts: tuple[Part, ...]
    whole: bool = True


def attention(name: str, path: str, module: Any, inner: tuple[str, str, str], out: str) -> Part:
    """Of heads."""
    rows = tuple((f"{path}.{layer}", 1) for layer in inner)
    return Part(name, f"{path}.{out}", module.heads, rows, heads=path)


def groups(channels: int, group: int) -> int:
    """How many groups channels are in. InputError where they do not go up."""
    if channels % group:
        raise InputError(f"an MLP of {channels} channels is not in groups of {group}")
    return channels // group


OURS, THEIRS = ("query", "key", "value"), ("to_q", "to_k", "to_v")


def _transformer(path: str, block: Any, group: int) -> Site:
    """Our block of a DiT."""
    parts = [attention(name, f"{path}.{name}", getattr(block, name), OURS, "out") for name in ("attention", "cross") if getattr(block, name) is not None]  # fmt: skip
    rows = ((f"{path}.mlp.gate", 1), (f"{path}.mlp.up", 1))
    return Site(path, (*parts, Part("mlp", f"{path}.mlp.out", groups(block.mlp.out.in_features, group), rows)))


def _maps(path: str, block: Any, group: int) -> Site:
    """Our attention on maps."""
    names = [name for name in ("attention", "cross") if getattr(block, name) is not None]
    return Site(path, tuple(attention(name, f"{path}.{name}", getattr(block, name), OURS, "out") for name in names))


def _residual(path: str, block: Any, group: int) -> Site:
    """Our residual block: the channels between its two convolutions."""
    told = () if block.modulation is None else ((f"{path}.modulation", 2),)
    part = Part("channels", f"{path}.second", block.second_norm.num_groups, (*told, (f"{path}.first", 1)), norm=f"{path}.second_norm")  # fmt: skip
    return Site(path, (part,), isinstance(block.shortcut, nn.Identity))


def _resnet(path: str, block: Any, group: int) -> Site:
    """diffusers' ResnetBlock2D, likewise."""
    times = 2 if block.time_embedding_norm == "scale_shift" else 1
    told = () if block.time_emb_proj is None else ((f"{path}.time_emb_proj", times),)
    part = Part("channels", f"{path}.conv2", block.norm2.num_groups, (*told, (f"{path}.conv1", 1)), norm=f"{path}.norm2")  # fmt: skip
    plain = block.conv_shortcut is None and block.upsample is None and block.downsample is None
    return Site(path, (part,), plain and block.output_scale_factor == 1)


def _basic(path: str, block: Any, group: int) -> Site:
    """diffusers' BasicTransformerBlock."""
    names = [(ours, theirs) for ours, theirs in (("attention", "attn1"), ("cross", "attn2")) if getattr(block, theirs, None) is not None]  # fmt: skip
    parts = [attention(ours, f"{path}.{theirs}", getattr(block, theirs), THEIRS, "to_out.0") for ours, theirs in names]
    first, last = block.ff.net[0].proj, block.ff.net[2]
    made = first.out_features // last.in_features
    mlp = Part("mlp", f"{path}.ff.net.2", groups(last.in_features, group), ((f"{path}.ff.net.0.proj", made),))
    return Site(path, (*parts, mlp))


Finder = Callable[[str, Any, int], Site]


def _kind(module: Any) -> Finder | None:
    """How a block of this kind is taken apart, if it is known."""
    if isinstance(module, Block) and isinstance(module.attention, Attention):
        return _transformer
    if isinstance(module, ImageAttention):
        return _maps
    if isinstance(module, ResidualBlock):
        return _residual
    if all(hasattr(module, name) for name in ("conv1", "norm2", "conv2", "time_emb_proj", "output_scale_factor")):
        return _resnet if isinstance(module.norm2, nn.GroupNorm) else None
    if all(hasattr(module, name) for name in ("attn1", "norm1", "ff")) and hasattr(getattr(module.ff, "net", [None])[0], "proj"):  # fmt: skip
        return _basic
    return None


def sites(net: nn.Module, group: int = 32) -> list[Site]:
    """The known blocks of a network, in the order of its modules. InputError where there is none.

    Known are sfumato's DiT and U-Net (residual blocks, attention), and diffusers' ResnetBlock2D and BasicTransformerBlock, which
    its U-Nets and many of its transformers are made of. group: channels of a gate of an MLP.
    """
    found = list(_sites(net, group))
    if not found:
        raise InputError(
            f"no block of a {type(net).__name__} is known: gates are for sfumato's DiT and U-Net, and for diffusers' networks of "
            "ResnetBlock2D and BasicTransformerBlock"
        )
    return found


def _sites(net: nn.Module, group: int) -> Iterator[Site]:
    for path, module in net.named_modules():
        kind = _kind(module)
        if kind is not None:
            yield kind(path, module, group)


__all__ = ["Part", "Site", "sites"]
