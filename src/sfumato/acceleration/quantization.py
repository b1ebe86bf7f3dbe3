"""Post-training quantisation: layers with fewer bits, the walker that puts them into a network, and small files."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.acceleration._registry import Fitted, register
from sfumato.acceleration.calibration import Batch, Calibration
from sfumato.acceleration.ranges import SEARCHES, Quantizer, levels, per_channel, search
from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, Wrap, rebuild
from sfumato.denoisers import Parametrized
from sfumato.denoisers.features import network
from sfumato.files import write_atomically

SAMPLE = 1 << 13  # values of a layer's input kept from a batch


class Quantized(nn.Module):
    """A linear layer or convolution whose weight, and whose input where ``input`` is set, can only take 2^bits values.

    It computes in floating point what integers would (:func:`sfumato.acceleration.int8` computes with integers). It has the
    attributes of the layer it stands for.
    """

    def __init__(self, base: nn.Module, weights: Quantizer) -> None:
        super().__init__()
        new: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        new.weight = nn.Parameter(weights(base.weight.detach()), requires_grad=False)  # type: ignore[operator]
        self.base, self.bits = new, weights.bits
        self.input: Quantizer | None = None
        self.register_buffer("scale", weights.scale)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.base(x if self.input is None else self.input(x), *args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["base"], name)

    @property
    def steps(self) -> Tensor:
        """The weight in units of its scale: whole numbers from -2^(bits - 1) to 2^(bits - 1) - 1."""
        return (self.base.weight / self.scale).round()


class Products(nn.Module):
    """The quantisers of the two matrix products of an attention: of query, key, probability and value."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = levels(bits) and bits
        self.ranges: dict[str, Quantizer] = {}
        self.seen: dict[str, list[Tensor]] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **other: Any) -> Tensor:  # type: ignore[override]  # fmt: skip
        """softmax(Q(q) Q(k)^T scale + mask), its quantised probabilities times Q(v)."""
        if dropout_p or is_causal or any(other.values()):
            raise InputError(
                "attention with dropout, a causal mask or grouped heads cannot be quantised: attention=False"
            )
        scores = self._of("query", q) @ self._of("key", k).transpose(-2, -1)
        scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
        return self._of("probability", scores.softmax(-1)) @ self._of("value", v)

    def _of(self, name: str, x: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.setdefault(name, []).append(_some(x))
        quantise = self.ranges.get(name)
        return x if quantise is None else quantise(x)


class _Attends:
    """Mixed into the class of an attention: torch's attention called within it goes through its quantisers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Redirect(self.products):  # type: ignore[attr-defined]
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Redirect(TorchFunctionMode):
    def __init__(self, products: Products) -> None:
        super().__init__()
        self.products = products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self.products if func is F.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))


def quantized(
    denoiser: Denoiser,
    calibration: Calibration,
    *,
    weights: int = 8,
    activations: int | None = 8,
    attention: bool = True,
    search: str = "lp",
    p: float = 2.4,
    symmetric: bool = False,
    skip: str | None = None,
    edges: int | None = None,
) -> Denoiser:
    """A copy of a denoiser whose network computes with few bits, its ranges fitted to a calibration set; simulated in floats.

    Every nn.Linear and nn.Conv2d gets ``weights`` bits, an output channel at a time and symmetric. Their inputs get
    ``activations`` bits, a tensor at a time, where they are maps or tokens; layers that only see one vector an item (the
    time, a pooled text) keep exact inputs, as normalisations, non-linearities and softmax do. The ranges of inputs are
    fitted with the weights already quantised. What is between network calls, the state first of all, is untouched.

    calibration  see :func:`sfumato.acceleration.denoised`
    weights      bits, 2 .. 16; ``activations`` as well, or None: weights only
    attention    quantise both products of attentions that call torch's scaled_dot_product_attention
    search, p    how ranges of inputs are chosen: :func:`sfumato.acceleration.ranges.search`
    symmetric    ranges of inputs are symmetric about 0
    skip         a pattern of layer paths that stay exact
    edges        bits, at least, of the layers that read the state and give the prediction; None: these two stay exact. A state
                 that is clipped or rounded is lost for all later steps, and these layers cost nothing (8 as published)

    Taps, guidance and solvers go on working, and paths of submodules stay. ``denoiser`` is untouched. Raises InputError that
    names a layer which the calibration never reached. Source: Shang, Yuan, Xie, Wu, Yan, 2023, "Post-training Quantization
    on Diffusion Models" (its ranges are averages over batches, here of all items at once; its reconstruction of roundings
    is left out).
    """
    for bits in (weights, edges, activations):
        levels(2 if bits is None else bits)
    if search not in SEARCHES:
        raise InputError(f"search = {search!r}: one of {', '.join(SEARCHES)}")
    net = network(denoiser)
    layers = _layers(net, skip)
    ends = _ends(denoiser, layers, next(calibration.batches(2)))
    if edges is None:
        layers = {path: m for path, m in layers.items() if path not in ends}
    wide = {path: max(weights, edges or 0) if path in ends else weights for path in layers}
    made = _rebuilt(denoiser, {path: Quantized(m, per_channel(m.weight, wide[path], p)) for path, m in layers.items()})
    if activations is None:
        return made
    products = _attend(network(made), activations, skip) if attention else {}
    seen = _observed(made, list(layers), products, calibration)
    for path, values in seen.items():
        n = max(activations, edges or 0) if path in ends else activations
        _target(network(made), path)(_searched(path, values, n, search, p, symmetric))
    for path, attends in products.items():
        if not attends.ranges:
            raise InputError(f"{path} never called scaled_dot_product_attention: attention=False, or skip= it")
        attends.seen = None
    return made


@register("quantized")
def fitted(
    weights: int = 8,
    activations: int | None = 8,
    attention: bool = True,
    items: int = 64,
    steps: int = 20,
    seed: int = 1,
) -> Fitted:
    """Fewer bits simulated in floats, to see what they cost: :func:`sfumato.acceleration.quantized` on runs of the model."""

    def make(denoiser: Denoiser, calibration: Calibration) -> Denoiser:
        return quantized(denoiser, calibration, weights=weights, activations=activations, attention=attention)

    return Fitted(make, items, steps, seed)


def _layers(net: nn.Module, skip: str | None) -> dict[str, Any]:
    """The layers to quantise, by path."""
    left = re.compile(skip) if skip else None
    found = {
        path: m for path, m in net.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and not (left and left.search(path))
    }  # fmt: skip
    if any(isinstance(m, Quantized) for m in net.modules()):
        raise InputError("this network is quantised already: begin with the original")
    if not found:
        raise InputError("no linear layer and no convolution is left to quantise")
    return found


def _leaf(denoiser: Denoiser) -> Parametrized:
    """The denoiser around the network, without guidance."""
    net = network(denoiser)
    return next(m for m in denoiser.modules() if isinstance(m, Parametrized) and m.net is net)


@torch.no_grad()
def _call(denoiser: Denoiser, batch: Batch, taps: list[tuple[str, Any]]) -> None:
    """One call of the network on a part of the calibration set."""
    ctx = Context(cond=batch.cond, batch=len(batch.x), taps=tuple(taps))
    _leaf(denoiser)(batch.x, batch.t, ctx)


def _ends(denoiser: Denoiser, layers: Mapping[str, Any], batch: Batch) -> set[str]:
    """The first layer that reads as many numbers as the state has, and the last that gives as many (else those called first
    and last). Raises InputError for a layer that is not called."""
    sizes: dict[str, tuple[int, int]] = {}

    def tap(path: str) -> Any:
        def around(ctx: Context, call: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = call(x, *args, **kwargs)
            sizes[path] = (x.numel(), out.numel()) if x.ndim > 2 else (0, 0)
            return out

        return around

    _call(denoiser, batch, [(path, tap(path)) for path in layers])
    missing = sorted(set(layers) - set(sizes))
    if missing:
        raise InputError(f"the calibration never reaches {', '.join(missing[:5])}: give its conditions, or skip= it")
    n, order = batch.x.numel(), list(sizes)
    first = next((path for path in order if sizes[path][0] == n), order[0])
    return {first, next((path for path in reversed(order) if sizes[path][1] == n), order[-1])}


def _rebuilt(denoiser: Denoiser, new: Mapping[str, nn.Module]) -> Any:
    """The denoiser with these layers in its network."""
    net = network(denoiser)
    swapped = rebuild(net, lambda path, m: new.get(path))
    made: Any = rebuild(denoiser, lambda path, m: None)
    for module in made.modules():
        if isinstance(module, Parametrized):
            module.net, module._graph = swapped, []
    return made.eval()


def _attend(net: nn.Module, bits: int, skip: str | None) -> dict[str, Products]:
    """Give the attentions of a network quantisers of their products, by path."""
    found: dict[str, Products] = {}
    for path, module in list(net.named_modules()):
        known = hasattr(module, "heads") and (hasattr(module, "query") or hasattr(module, "to_q"))
        if known and not (skip and re.search(skip, path)):
            module.__class__ = type(type(module).__name__, (_Attends, type(module)), {})
            module.products = found[path] = Products(bits)
            found[path].seen = {}
    return found


def _observed(
    denoiser: Denoiser, layers: list[str], products: Mapping[str, Products], calibration: Calibration
) -> dict[str, Tensor]:
    """A sample of the inputs of each layer that sees maps or tokens, and of each product, by path."""
    seen: dict[str, list[Tensor]] = {}

    def tap(path: str) -> Any:
        def around(ctx: Context, call: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.ndim > 2:
                seen.setdefault(path, []).append(_some(x))
            return call(x, *args, **kwargs)

        return around

    for batch in calibration.batches():
        _call(denoiser, batch, [(path, tap(path)) for path in layers])
    for path, attends in products.items():
        seen |= {f"{path}:{name}": values for name, values in (attends.seen or {}).items()}
    return {path: torch.cat(values) for path, values in seen.items()}


def _some(x: Tensor) -> Tensor:
    """Evenly spaced values of x, and its extremes."""
    flat = x.detach().flatten()
    stride = -(-len(flat) // SAMPLE) | 1  # odd: it meets all channels
    return torch.cat([flat[::stride], flat.min()[None], flat.max()[None]])


def _searched(path: str, values: Tensor, bits: int, method: str, p: float, symmetric: bool) -> Quantizer:
    try:
        return search(values, bits, method, p, symmetric)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _target(net: nn.Module, path: str) -> Any:
    """What takes the quantiser found for a path, ``layer`` or ``attention:product``."""
    owner, _, product = path.partition(":")
    module: Any = net.get_submodule(owner)
    if product:
        return lambda found: module.products.ranges.__setitem__(product, found)
    return lambda found: setattr(module, "input", found)


@dataclass(frozen=True)
class Rounded(Wrap):
    """A solver whose states can only take the values of a quantiser: what storing x_t in few bits does to a run."""

    inner: Solver
    quantise: Quantizer

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        st = self.inner.step(st, s, denoiser, ctx)
        return replace(st, x=self.quantise(st.x))  # type: ignore[arg-type]


def layers(denoiser: Denoiser) -> dict[str, Quantized]:
    """The quantised layers of a denoiser, by path. Raises InputError where there are none."""
    found = {path: m for path, m in network(denoiser).named_modules() if isinstance(m, Quantized)}
    if not found:
        raise InputError("this denoiser is not quantised: quantized(denoiser, calibration) makes one that is")
    return found


def save(denoiser: Denoiser, path: str | Path) -> int:
    """Write a quantised network as one safetensors file, whole numbers packed (two a byte up to 4 bits): its size in bytes."""
    from safetensors.torch import save as serialise

    found, net = layers(denoiser), network(denoiser)
    tensors = {k: v for k, v in net.state_dict().items() if not any(k.startswith(f"{p}.") for p in found)}
    facts: dict[str, Any] = {}
    for name, layer in found.items():
        tensors |= {f"{name}.codes": _packed(layer.steps, layer.bits), f"{name}.scale": layer.scale}
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
        read = None if layer.input is None else list(layer.input)
        facts[name] = {"bits": layer.bits, "shape": list(layer.base.weight.shape), "input": read}
    ranges = {p: {k: list(q) for k, q in m.products.ranges.items()} for p, m in net.named_modules() if isinstance(m, _Attends)}  # type: ignore[attr-defined]  # fmt: skip
    metadata = {"layers": json.dumps(facts), "products": json.dumps(ranges)}
    write_atomically(Path(path), serialise({k: v.contiguous().clone() for k, v in tensors.items()}, metadata))
    return Path(path).stat().st_size


def load(denoiser: Denoiser, path: str | Path) -> Denoiser:
    """The quantised form of ``denoiser`` that :func:`save` wrote. Raises InputError for the file of another network."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if "layers" not in metadata:
            raise InputError(f"{path} is no quantised network: save(denoiser, path) writes one")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    facts, ranges, net = json.loads(metadata["layers"]), json.loads(metadata["products"]), network(denoiser)
    new: dict[str, nn.Module] = {}
    for name, fact in facts.items():
        try:
            base: Any = net.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"{path} has a layer {name}, this network has not: it was made for another one") from error
        if list(base.weight.shape) != fact["shape"]:
            raise InputError(
                f"{path}: {name} is {fact['shape']} there and {list(base.weight.shape)} here: it was made for another one"
            )
        scale, bits = tensors.pop(f"{name}.scale"), fact["bits"]
        codes = _unpacked(tensors.pop(f"{name}.codes"), bits, base.weight.shape)
        layer = Quantized(base, Quantizer(scale, 1 << (bits - 1), bits))
        layer.base.weight = nn.Parameter(codes.to(scale) * scale, requires_grad=False)
        bias = tensors.pop(f"{name}.bias", None)
        layer.base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        layer.input = None if fact["input"] is None else Quantizer(*fact["input"])
        new[name] = layer
    made = _rebuilt(denoiser, new)
    inner = rebuild(network(made), lambda p, m: None)
    for key, value in tensors.items():
        owner, _, leaf = key.rpartition(".")
        module: Any = inner.get_submodule(owner)
        kept = module._parameters if leaf in module._parameters else module._buffers
        kept[leaf] = nn.Parameter(value, requires_grad=False) if kept is module._parameters else value
    for where, each in ranges.items():
        module = inner.get_submodule(where)
        module.__class__ = type(type(module).__name__, (_Attends, type(module)), {})
        module.products = Products(next(iter(each.values()))[2])
        module.products.ranges = {k: Quantizer(*q) for k, q in each.items()}
    for module in made.modules():
        if isinstance(module, Parametrized):
            module.net = inner
    return made


def _packed(steps: Tensor, bits: int) -> Tensor:
    """Whole numbers as int16, int8, or two a byte."""
    if bits > 4:
        return steps.to(torch.int16 if bits > 8 else torch.int8)
    flat = (steps.flatten() + 8).to(torch.uint8)
    flat = F.pad(flat, (0, len(flat) % 2))
    return flat[::2] | flat[1::2] << 4


def _unpacked(codes: Tensor, bits: int, shape: torch.Size) -> Tensor:
    if bits <= 4:
        codes = torch.stack([codes & 15, codes >> 4], 1).flatten()[: shape.numel()].to(torch.int8) - 8
    return codes.view(shape)


__all__ = ["Products", "Quantized", "Rounded", "layers", "load", "quantized", "save"]
