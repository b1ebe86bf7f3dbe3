"""Reuse of what changes slowly between network calls: outputs of named submodules, recomputed at some calls only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, TypeAlias

import torch
from torch import nn

from sfumato.acceleration._registry import register
from sfumato.core import Context, Denoiser, Guidance, InputError, Wrapper, first
from sfumato.denoisers.features import network

Schedule: TypeAlias = Callable[[int, "int | None"], bool]
"""(index of the network call, calls of the run or None) -> whether the call is made in full."""


class Cached(Wrapper):
    """See :func:`cached`."""

    def __init__(self, inner: Denoiser, modules: Sequence[str], full: Schedule, residual: bool) -> None:
        super().__init__(inner)
        self.modules_cached, self.full, self.residual = tuple(modules), full, residual

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        refuse_gradient(self.inner, x)
        own = ctx.fork("cache")
        index, like = own.memory.get("calls", 0), (first(x).shape, first(x).dtype, first(x).device)
        kept = own.memory.setdefault("kept", {})
        again = not kept or self.full(index, ctx.run.total)
        if not again and own.memory["like"] != like:
            raise InputError(
                f"the state was {own.memory['like'][0]} when the features were kept and is {like[0]} now: wrap each "
                "inner call in its own fork, as sfumato.guidance does"
            )
        tap = self._keep(kept) if again else self._reuse(kept)
        own.memory |= {"calls": index + 1, "like": like}
        return self.inner(x, t, own.fork(taps=[(path, tap(path)) for path in self.modules_cached]))

    def _keep(self, kept: dict[str, Any]) -> Callable[[str], Any]:
        def tap(path: str) -> Any:
            def around(ctx: Context, call: Any, *args: Any, **kwargs: Any) -> Any:
                out = call(*args, **kwargs)
                kept[path] = out - _input(args, kwargs) if self.residual else out
                return out

            return around

        return tap

    def _reuse(self, kept: dict[str, Any]) -> Callable[[str], Any]:
        def tap(path: str) -> Any:
            def around(ctx: Context, call: Any, *args: Any, **kwargs: Any) -> Any:
                return _input(args, kwargs) + kept[path] if self.residual else kept[path]

            return around

        return tap


def refuse_gradient(inner: nn.Module, x: Any) -> None:
    """InputError where a gradient would be recorded: what is kept from other calls has none."""
    if torch.is_grad_enabled() and (first(x).requires_grad or any(p.requires_grad for p in inner.parameters())):
        raise InputError("no gradient passes through what is cached: sample without grad, or without the cache")


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a block, however it is passed."""
    return args[0] if args else next(iter(kwargs.values()))


def every(interval: int = 3, last: int = 0) -> Schedule:
    """Calls 0, interval, 2 interval, ... in full, and the ``last`` calls of a run of known length; interval 1 is all."""
    if not (isinstance(interval, int) and interval >= 1 and last >= 0):
        raise InputError(f"interval = {interval}, last = {last}: whole numbers, at least 1 and 0")
    return partial(_every, interval, last)


def _every(interval: int, last: int, index: int, total: int | None) -> bool:
    return index % interval == 0 or (total is not None and index >= total - last)


def around(center: float = 15.0, power: float = 1.4, interval: int = 3) -> Schedule:
    """As many full calls as ``every(interval)``, closer together around call ``center``: the non-uniform 1:N rule.

    ceil(total / interval) values l evenly from -center^(1/p) to (total - center)^(1/p); the calls are sign(l) |l|^p +
    center, rounded down; p starts at ``power`` and falls by 0.02 until all are different. For runs of a known length;
    ``interval`` calls apart where it is not known. Source: Ma, Fang, Wang, 2024, "DeepCache".
    """
    if not (power >= 1 and center >= 0):
        raise InputError(f"center = {center}, power = {power}: not negative, and at least 1")
    return partial(_around, center, power, every(interval), interval)


def _around(center: float, power: float, regular: Schedule, interval: int, index: int, total: int | None) -> bool:
    if total is None:
        return regular(index, total)
    return index == 0 or index in _spread(total, -(-total // interval), min(center, total), power)


@lru_cache(maxsize=64)
def _spread(total: int, count: int, center: float, power: float) -> frozenset[int]:
    """The calls of :func:`around`."""
    while True:
        low, high = -(center ** (1 / power)), (total - center) ** (1 / power)
        values = [low + (high - low) * i / count for i in range(count)]
        found = {max(0, min(total - 1, math.floor(math.copysign(abs(v) ** power, v) + center))) for v in values}
        if len(found) == count or power <= 1:
            return frozenset(found)
        power = max(1.0, power - 0.02)


def cached(modules: Sequence[str], *, full: Schedule | None = None, residual: bool = False) -> Guidance:
    """Run the network in full at some calls; at the others the named submodules return what they returned last.

    modules   paths below the network
    full      which calls are made in full: :func:`every` (default, 1 of 3), :func:`around`
    residual  keep output - input of each module and add it to its present input: for blocks of a residual stream

    Everything else of the network runs at every call, and what only feeds the named modules is not run at all where they
    contain it. All is kept in the Context, a branch for each fork: runs in other threads, and the two halves of
    guidance, never meet. With every call in full it is the network, bit for bit. Put it inside guidance:
    ``cfg(3.0)(cached(...)(denoiser))``. ``nfe`` goes on counting network calls, in full or not:
    :func:`sfumato.acceleration.operations` counts the work. Raises InputError where a gradient is asked for.
    """
    if not modules:
        raise InputError("name at least one submodule to cache")
    return lambda inner: Cached(inner, modules, full or every(), residual)


@register("deepcache")
def deepcache(
    interval: int = 3,
    branch: int = 0,
    *,
    schedule: str = "uniform",
    center: float = 15.0,
    power: float = 1.4,
    last: int = 0,
) -> Guidance:
    """DeepCache: the deep part of the network is recomputed every ``interval`` calls, the shallow part at all of them.

    branch    how much stays shallow. U-Net: resolutions that are run at every call, less one (0: only the first). DiT: blocks at
              either end that are run at every call, less one; the blocks between keep their residuals
    schedule  "uniform", or "around": :func:`around` call ``center``
    last      calls at the end of a run that are made in full ("uniform" only)

    Knows sfumato's U-Net and DiT, and diffusers' UNet2DModel, UNet2DConditionModel and transformers with
    ``transformer_blocks``. interval = 1 is the plain network. Source: Ma, Fang, Wang, 2024, "DeepCache: Accelerating
    Diffusion Models for Free".
    """
    if schedule not in ("uniform", "around"):
        raise InputError(f"schedule = {schedule!r}: 'uniform' or 'around'")
    full = every(interval, last) if schedule == "uniform" else around(center, power, interval)

    def wrap(inner: Denoiser) -> Denoiser:
        modules, residual = deep_modules(network(inner), branch)
        return Cached(inner, modules, full, residual)

    return wrap


def deep_modules(net: nn.Module, branch: int) -> tuple[list[str], bool]:
    """(paths, whether they are residual blocks) of what :func:`deepcache` keeps."""
    if branch < 0:
        raise InputError(f"branch = {branch}: not negative")
    for path, module in net.named_modules():  # diffusers' networks stand inside an adapter
        prefix = f"{path}." if path else ""
        if hasattr(module, "bottleneck_path"):
            depth = module.levels  # type: ignore[union-attr]
            _within(branch, depth, "resolutions")
            return [prefix + ".".join(["level"] + ["deep"] * (branch + 1))], False
        if hasattr(module, "down_blocks") and hasattr(module, "up_blocks"):
            depth = len(module.down_blocks)  # type: ignore[arg-type]
            _within(branch, depth, "resolutions")
            names = [f"down_blocks.{i}" for i in range(branch + 1, depth)] + ["mid_block"]
            return [prefix + name for name in [*names, *(f"up_blocks.{i}" for i in range(depth - 1 - branch))]], False
        for name in ("blocks", "transformer_blocks"):
            blocks = getattr(module, name, None)
            if isinstance(blocks, nn.ModuleList):
                if len(getattr(module, "levels", ())) > 1:
                    raise InputError(
                        "a FlexDiT's blocks have another number of tokens at another time: nothing to keep"
                    )
                _within(branch, (len(blocks) - 1) // 2, "blocks at either end")
                return [f"{prefix}{name}.{i}" for i in range(branch + 1, len(blocks) - branch - 1)], True
    raise InputError(f"{type(net).__name__} has no known deep part: name its modules, cached([...])")


def _within(branch: int, count: int, what: str) -> None:
    if branch >= count:
        raise InputError(f"branch = {branch}: this network has {count} {what}, so at most {count - 1}")


__all__ = ["Cached", "Schedule", "around", "cached", "deep_modules", "deepcache", "every"]
