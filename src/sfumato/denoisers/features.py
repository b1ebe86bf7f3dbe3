"""What happens inside a denoiser's network: where its features are, and how they are read and changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, InputError, Posterior
from sfumato.core.context import Tap
from sfumato.denoisers.parametrized import Parametrized

STACKS = ("blocks", "transformer_blocks")  # of transformers: ours, diffusers'


def network(denoiser: nn.Module) -> nn.Module:
    """The one network inside a denoiser, whatever guidance is around it. InputError where there is none, or several."""
    nets = {id(m.net): m.net for m in denoiser.modules() if isinstance(m, Parametrized)}
    if len(nets) != 1:
        raise InputError(
            f"{len(nets)} networks inside this {type(denoiser).__name__}: features are read from exactly one"
        )
    return next(iter(nets.values()))


def bottleneck(net: nn.Module) -> str:
    """Path of the deepest submodule of a network, or of the one inside a denoiser: its output is the h-space.

    Our U-Nets say it themselves (``bottleneck_path``), a diffusers U-Net has ``mid_block``; of a transformer, which has
    no bottleneck, it is the middle block. Source: Kwon, Jeong, Uh, 2023, "Diffusion Models already have a Semantic Latent
    Space". InputError for anything else: give the path yourself.
    """
    net = network(net) if isinstance(net, Denoiser) else net
    path = getattr(net, "bottleneck_path", None)
    if path is not None:
        return str(path)
    prefix = "model." if isinstance(getattr(net, "model", None), nn.Module) else ""  # the adapter of a foreign model
    inner: Any = net.get_submodule("model") if prefix else net
    if isinstance(getattr(inner, "mid_block", None), nn.Module):
        return f"{prefix}mid_block"
    for stack in STACKS:
        blocks = getattr(inner, stack, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return f"{prefix}{stack}.{len(blocks) // 2}"
    near = ", ".join(name for name, _ in net.named_children()) or "nothing"
    raise InputError(
        f"no bottleneck is known in a {type(net).__name__}: give path=, a submodule; it consists of {near}"
    )


def reading(path: str, keep: Callable[[Tensor], None]) -> tuple[str, Tap]:
    """A tap that shows the output of the submodule ``path`` to ``keep`` and leaves it as it is."""

    def around(ctx: Context, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        keep(_tensor(out, path))
        return out

    return path, around


def changing(path: str, change: Callable[[Tensor], Tensor]) -> tuple[str, Tap]:
    """A tap that puts ``change(h)`` in the place of the output h (B, *) of the submodule ``path``.

    Where a guidance has stacked several readings of the B items, each stack of B is changed on its own.
    """

    def around(ctx: Context, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = _tensor(call(*args, **kwargs), path)
        if len(out) % ctx.batch:
            raise InputError(
                f"{len(out)} rows at {path!r} for {ctx.batch} items: this submodule is not one row an item"
            )
        parts = [change(part) for part in out.split(ctx.batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return path, around


def features(
    denoiser: Denoiser, x: Tensor, t: Any, ctx: Context, paths: Sequence[str]
) -> tuple[Posterior, dict[str, Tensor]]:
    """(belief, {path: output of that submodule}), with gradients wherever the caller has them on.

    Features have one row an item; under a guidance that stacks its readings they are those of the first, the conditional
    one. Nothing is left behind on the network, and two threads never see each other's features. InputError for a path
    that the network does not have or that was not called.
    """
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[Tensor], None]:
        return lambda h: None if path in found else found.update({path: h[: ctx.batch]})

    taps = [reading(path, keep(path)) for path in paths]
    post = denoiser(x, t, ctx.fork(taps=taps))
    missing = [path for path in paths if path not in found]
    if missing:
        raise InputError(f"the network never called {', '.join(missing)}")
    return post, {path: found[path] for path in paths}


def as_maps(h: Tensor, x: Tensor) -> Tensor:
    """Feature maps (B, C, H, W): tokens (B, N, C) are laid out as the picture x (B, *, H, W) is, row by row."""
    if h.ndim == 4:
        return h
    height, width = x.shape[-2:]
    patch = round((height * width / h.shape[1]) ** 0.5) if h.ndim == 3 else 0
    if not patch or (height // patch) * (width // patch) != h.shape[1]:
        raise InputError(f"features {tuple(h.shape)} are no maps and no tokens of a picture {tuple(x.shape)}")
    return h.transpose(1, 2).unflatten(2, (height // patch, width // patch))


def _tensor(out: Any, path: str) -> Tensor:
    if not isinstance(out, Tensor):
        raise InputError(f"{path!r} gives a {type(out).__name__}, not one tensor: name a submodule inside it")
    return out


__all__ = ["as_maps", "bottleneck", "changing", "features", "network", "reading"]
