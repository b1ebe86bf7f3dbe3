"""Low-rank adapters: put into any network, taken out, merged, combined and stored under the names other tools use."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core import InputError, rebuild

STYLES = ("diffusers", "kohya")


class Layer(NamedTuple):
    """The difference (alpha / rank) up down of one weight: down (r, in, ...), up (out, r, ...)."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    def difference(self) -> Tensor:
        """The whole difference, in the shape of the weight."""
        full = self.up.flatten(1) @ self.down.flatten(1)
        return (self.alpha / self.rank * full).reshape(self.up.shape[0], *self.down.shape[1:])


class Adapted(nn.Module):
    """A linear or convolutional layer W with W + scale (alpha / r) B A; A is drawn, B begins at zero."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        weight = base.weight
        self.base, self.alpha, self.scale = base, alpha, 1.0
        self.down = nn.Parameter(torch.empty(rank, *weight.shape[1:], dtype=weight.dtype, device=weight.device))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2)))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        factor = self.scale * self.alpha / self.down.shape[0]
        if isinstance(self.base, nn.Conv2d):
            base = self.base
            hidden = F.conv2d(x, self.down, None, base.stride, base.padding, base.dilation)
            return base(x) + factor * F.conv2d(hidden, self.up)
        return self.base(x) + factor * F.linear(F.linear(x, self.down), self.up)

    def __getattr__(self, name: str) -> Any:
        """What a network asks of its layers (``weight``, ``bias``, ``in_features``, ...) is that of W."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def layer(self) -> Layer:
        """The adapter in it."""
        return Layer(self.down.detach(), self.up.detach(), self.alpha * self.scale)


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank differences by the path of the layer they belong to."""

    layers: Mapping[str, Layer]

    def __mul__(self, weight: float) -> Adapter:
        """The adapter, ``weight`` times as strong."""
        return Adapter({k: v._replace(alpha=v.alpha * weight) for k, v in self.layers.items()})

    __rmul__ = __mul__

    def __add__(self, other: Adapter) -> Adapter:
        """The sum of both differences, exactly: its ranks are the sums of theirs."""
        joined = dict(self.layers)
        for path, layer in other.layers.items():
            joined[path] = _joined(joined[path], layer, path) if path in joined else layer
        return Adapter(joined)

    def save(self, path: str | Path, style: str = "diffusers", prefix: str | None = None) -> Path:
        """One safetensors file, its keys as diffusers and PEFT or as kohya's scripts name them.

        'diffusers'  unet.PATH.lora_A.weight (down), .lora_B.weight (up); alpha is put into up
        'kohya'      lora_unet_PATH.lora_down.weight, .lora_up.weight, .alpha, with _ for . in PATH
        """
        from safetensors.torch import save

        from sfumato.files import write_atomically

        if style not in STYLES:
            raise InputError(f"style = {style!r}: use one of {', '.join(STYLES)}")
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            if style == "diffusers":
                key = f"{prefix or 'unet'}.{name}"
                tensors[f"{key}.lora_A.weight"] = layer.down
                tensors[f"{key}.lora_B.weight"] = layer.up * (layer.alpha / layer.rank)
            else:
                key = f"{prefix or 'lora_unet'}_{name.replace('.', '_')}"
                tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = layer.down, layer.up
                tensors[f"{key}.alpha"] = torch.tensor(float(layer.alpha))
        write_atomically(Path(path), save({k: v.contiguous() for k, v in tensors.items()}))
        return Path(path)


def load(path: str | Path, net: nn.Module) -> Adapter:
    """The adapter in a file of diffusers', PEFT's or kohya's key names, for the layers of ``net``.

    Raises InputError that names the first key without a layer, or of another shape.
    """
    from safetensors.torch import load_file

    tensors = load_file(path)
    named = {name: module for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    flat = {name.replace(".", "_"): name for name in named}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        found = re.fullmatch(r"(.+?)\.(lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?:\.weight)?", key)
        if not found:
            raise InputError(f"{path}: {key!r} is no key of an adapter (lora_A, lora_B, lora_down, lora_up, alpha)")
        name = _place(found[1], named, flat)
        if name is None:
            raise InputError(f"{path}: {key!r} belongs to no layer of this network: it was made for another one")
        role = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}.get(found[2], "alpha")
        parts.setdefault(name, {})[role] = value
    layers: dict[str, Layer] = {}
    for name, part in parts.items():
        if not {"down", "up"} <= set(part):
            raise InputError(f"{path}: {name} has only {sorted(part)}; down and up belong together")
        alpha = float(part["alpha"]) if "alpha" in part else float(part["down"].shape[0])
        layers[name] = Layer(part["down"].float(), part["up"].float(), alpha)
    _fits(layers, named, str(path))
    return Adapter(layers)


def inject(net: nn.Module, rank: int = 8, *, alpha: float | None = None, targets: str = ".*", seed: int = 0) -> Any:
    """A new tree that shares every weight with ``net`` and adds B A to the layers whose path matches ``targets``.

    Only A and B require gradients; ``net`` is untouched, and so is what it computes until B is trained. alpha: default rank.
    Layers of convolutions in groups are left out. Raises InputError where nothing matches.
    """
    if rank < 1:
        raise InputError(f"rank = {rank}: at least 1")
    pattern = re.compile(targets)

    def swap(path: str, module: nn.Module) -> nn.Module | None:
        plain = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if not plain or not pattern.search(path):
            return None
        return Adapted(module, rank, float(rank if alpha is None else alpha))  # type: ignore[arg-type]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = rebuild(net, swap)
    for module in list(new.modules()):
        own = isinstance(module, Adapted)
        for name, p in list(module._parameters.items()):
            if p is not None and not own:
                module._parameters[name] = nn.Parameter(p.detach(), requires_grad=False)
    if not any(isinstance(m, Adapted) for m in new.modules()):
        raise InputError(f"no linear layer or convolution matches targets = {targets!r}")
    return new


def extract(net: nn.Module) -> Adapter:
    """The adapter in a network that :func:`inject` made."""
    layers = {path: m.layer() for path, m in net.named_modules() if isinstance(m, Adapted)}
    if not layers:
        raise InputError("this network holds no adapter: inject one, or take difference(base, tuned)")
    return Adapter({k: Layer(v.down.clone(), v.up.clone(), v.alpha) for k, v in layers.items()})


@torch.no_grad()
def difference(base: nn.Module, tuned: nn.Module, rank: int = 8, *, targets: str = ".*") -> Adapter:
    """The best adapter of this rank for tuned - base: the leading singular vectors of each layer's difference.

    Exact where that difference has this rank. Layers without a difference are left out.
    """
    others, pattern = dict(tuned.named_modules()), re.compile(targets)
    layers: dict[str, Layer] = {}
    for path, module in base.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or not pattern.search(path):
            continue
        other: Any = others.get(path)
        if other is None or other.weight.shape != module.weight.shape:
            raise InputError(f"{path} is in one network only, or of another shape: they are no two versions of one")
        gap = (other.weight - module.weight).double()
        if not bool(gap.any()):
            continue
        u, s, v = torch.linalg.svd(gap.flatten(1), full_matrices=False)
        k = min(rank, len(s))
        root = s[:k].sqrt()
        down = (root[:, None] * v[:k]).reshape(k, *gap.shape[1:])
        up = (u[:, :k] * root).reshape(gap.shape[0], k, *[1] * (gap.ndim - 2))
        layers[path] = Layer(down.to(module.weight.dtype), up.to(module.weight.dtype), float(k))
    if not layers:
        raise InputError("the two networks do not differ in any linear layer or convolution that matches")
    return Adapter(layers)


@torch.no_grad()
def merge(net: nn.Module, adapter: Adapter | None = None, weight: float = 1.0) -> Any:
    """A plain network with the differences added to its weights: of ``adapter``, or those :func:`inject` put into it.

    Weights that change are new; the others are shared, and ``net`` is untouched. Raises InputError for an adapter of
    another network.
    """
    if adapter is None:
        adapter, net = extract(net), rebuild(net, lambda path, m: m.base if isinstance(m, Adapted) else None)
    named = {name: m for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    _fits(adapter.layers, named, "the adapter")
    new = rebuild(net, lambda path, m: None)
    for path, layer in adapter.layers.items():
        module: Any = new.get_submodule(path)
        full = layer.difference().to(module.weight) * weight
        module.weight = nn.Parameter(module.weight + full, requires_grad=module.weight.requires_grad)
    return new


def combine(net: nn.Module, adapters: Mapping[Adapter, float]) -> Any:
    """The network with several adapters at once: W + sum_i w_i (alpha_i / r_i) B_i A_i."""
    total: Adapter | None = None
    for adapter, weight in adapters.items():
        total = adapter * weight if total is None else total + adapter * weight
    if total is None:
        raise InputError("give at least one adapter and its weight")
    return merge(net, total)


def size(adapter: Adapter) -> int:
    """How many numbers it holds."""
    return sum(layer.down.numel() + layer.up.numel() for layer in adapter.layers.values())


def _joined(a: Layer, b: Layer, path: str) -> Layer:
    if a.down.shape[1:] != b.down.shape[1:] or a.up.shape[0] != b.up.shape[0]:
        raise InputError(f"the adapters differ in the shape of {path}: they are for different networks")
    up = torch.cat([a.up * (a.alpha / a.rank), b.up * (b.alpha / b.rank)], 1)
    return Layer(torch.cat([a.down, b.down]), up, float(up.shape[1]))


def _place(key: str, named: Mapping[str, nn.Module], flat: Mapping[str, str]) -> str | None:
    """The path of a layer from a key with or without a prefix, in points or in underscores."""
    pieces = key.split(".")
    for cut in range(len(pieces)):
        if ".".join(pieces[cut:]) in named:
            return ".".join(pieces[cut:])
    for name in (key.removeprefix("lora_unet_").removeprefix("lora_transformer_"), key):
        if name.replace(".", "_") in flat:
            return flat[name.replace(".", "_")]
    return None


def _fits(layers: Mapping[str, Layer], named: Mapping[str, nn.Module], what: str) -> None:
    for path, layer in layers.items():
        module: Any = named.get(path)
        if module is None:
            raise InputError(f"{what}: there is no layer {path} in this network, it was made for another one")
        shape = (layer.up.shape[0], *layer.down.shape[1:])
        if shape != tuple(module.weight.shape) or layer.up.shape[1] != layer.rank:
            raise InputError(f"{what}: {path} is of shape {shape} there and {tuple(module.weight.shape)} here")


__all__ = ["Adapted", "Adapter", "Layer", "combine", "difference", "extract", "inject", "load", "merge", "size"]
