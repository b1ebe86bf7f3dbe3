"""Region-adaptive sampling: a transformer runs on the tokens in focus; the others keep what was last said of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.acceleration._registry import register
from sfumato.acceleration.caching import refuse_gradient
from sfumato.core import Context, Denoiser, Guidance, InputError, Streams, Wrapper, first, mix
from sfumato.core.context import Tap
from sfumato.denoisers.features import network
from sfumato.networks.dit import DiT, flat

METRICS = ("std", "norm", "random")
ACTIVE, DRAW = "active", 0x9A5


def focus(prediction: Tensor, patch: int, metric: str = "std") -> Tensor:
    """How much a token (patch x patch pixels) changes, (B, N): the mean over its pixels of a number of their channels.

    metric  "std" of the channels (unbiased), or their "norm". Under Euler's method on a flow the update of a step is a
            multiple of the prediction (B, C, H, W), so the tokens are in the same order by either
    """
    pixels = prediction.std(1) if metric == "std" else prediction.norm(dim=1)
    return F.avg_pool2d(pixels[:, None].float(), patch).flatten(1)


def choose(
    importance: Tensor, skipped: Tensor, count: int, high: float = 0.3, starvation: float = 1.0, exact: bool = False
) -> Tensor:
    """Sorted indices (B, N - count) of the tokens that go on: ``count`` are skipped, of the most and the least important.

    importance  (B, N), not negative; ``skipped`` (B, N), how often each was skipped
    high        share of the skipped that are the most important ones; the others are the least important
    starvation  k: importance exp(k skipped) among the least important and exp(-k skipped) among the most, so that what was
                skipped long is taken up again in either case. ``exact`` is the released rule, exp(k skipped) in both
    """
    most, log = round(high * count), importance.double().log()
    small = log + starvation * skipped
    large = small if exact else log - starvation * skipped
    top = large.argsort(dim=1, descending=True, stable=True)[:, :most]
    bottom = small.scatter(1, top, torch.inf).argsort(dim=1, stable=True)[:, : count - most]
    out = torch.zeros_like(importance, dtype=torch.int64).scatter(1, torch.cat([top, bottom], 1), 1)
    return out.argsort(dim=1, stable=True)[:, : importance.shape[1] - count]


class RegionAdaptive(Wrapper):
    """See :func:`region_adaptive`."""

    def __init__(
        self,
        inner: Denoiser,
        ratio: float,
        full: tuple[int, frozenset[int]],
        metric: str,
        high: float,
        starvation: float,
        exact: bool,
        keys: bool,
    ) -> None:
        super().__init__(inner)
        net = network(inner)
        if not isinstance(net, DiT) or ACTIVE not in net.accepts:
            raise InputError(
                f"a {type(net).__name__} cannot run on some of its tokens: region_adaptive is for sfumato's DiT"
            )
        self.patch, self.ratio, self.full, self.metric = net.patch, ratio, full, metric
        self.high, self.starvation, self.exact = high, starvation, exact
        self.taps: list[tuple[str, Tap]] = [("", partial(_outputs, net.patch))]
        if keys:
            self.taps += [
                (f"blocks.{i}.attention.keys_values", partial(_keys_values, str(i))) for i in range(len(net.blocks))
            ]

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        refuse_gradient(self.inner, x)
        own = ctx.fork("regions")
        index, skipped = self._index(first(x), own), own.memory.get("skipped")
        cond = dict(own.cond)
        if index >= self.full[0] and index not in self.full[1]:
            importance = own.memory["focus"]
            skipped = torch.zeros_like(importance) if skipped is None else skipped
            n = importance.shape[1]
            count = n - max(1, round(self.ratio * n))
            active = choose(importance, skipped, count, self.high, self.starvation, self.exact)
            skipped = skipped + 1 - torch.zeros_like(skipped).scatter(1, active, 1.0)
            cond[ACTIVE] = active
        post = self.inner(x, t, own.fork(cond=cond, taps=self.taps))
        own.memory |= {"calls": index + 1, "skipped": skipped, "focus": self._importance(post.native, own)}
        return post

    def _index(self, x: Tensor, own: Context) -> int:
        """Which call of the run this is."""
        index, like = int(own.memory.get("calls", 0)), (x.shape, x.dtype, x.device)
        if index and own.memory["like"] != like:
            raise InputError(
                f"the state was {tuple(own.memory['like'][0])} at the call before and is {tuple(x.shape)} now: wrap each inner "
                "call in its own fork, as sfumato.guidance does"
            )
        total, resets = own.run.total, self.full[1]
        if not index and total is not None and resets and max(resets) >= total:
            raise InputError(f"resets = {sorted(resets)}: this run has {total} steps, the first is 0")
        own.memory["like"] = like
        return index

    def _importance(self, prediction: Tensor, own: Context) -> Tensor:
        if self.metric != "random":
            return focus(prediction, self.patch, self.metric)
        if own.rng is None:
            raise InputError("metric='random' draws from the run's streams, and this run has none: choose another")
        streams = Streams(tuple((mix(seed, DRAW), i) for seed, i in own.rng.seeds), own.rng.step)
        drawn = streams.uniform(focus(prediction, self.patch)[: len(streams.seeds)])
        return drawn.repeat(len(prediction) // len(drawn), 1)


def _outputs(patch: int, ctx: Context, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A tap: the network's output; where a token is not active, what it was before in this branch of the memory."""
    active = ctx.cond.get(ACTIVE)
    if active is not None:
        _refuse_others(ctx)
    out = call(*args, **kwargs)
    if active is not None:
        grid = out.shape[0], 1, out.shape[2] // patch, out.shape[3] // patch
        chosen = out.new_zeros(len(out), grid[2] * grid[3]).scatter(1, active, 1.0).view(grid)
        out = torch.where(F.interpolate(chosen, scale_factor=patch).bool(), out, _kept(ctx, "output"))
    ctx.memory["output"] = out
    return out


def _keys_values(name: str, ctx: Context, call: Callable[..., Any], *pair: Tensor) -> Any:
    """A tap: keys and values of all tokens; those of the active ones are new, the others are the last that were computed."""
    new = call(*pair)
    active = ctx.cond.get(ACTIVE)
    if active is not None:
        new = tuple(_replaced(old, active, v) for old, v in zip(_kept(ctx, name), new, strict=True))
    ctx.memory[name] = new
    return new


def _replaced(old: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """old (B, heads, N, d) with ``new`` (B, heads, K, d) in the places ``index`` (B, K)."""
    rows = old.transpose(1, 2).flatten(2)
    total = rows.flatten(0, 1).index_copy(0, flat(index, old.shape[2]), new.transpose(1, 2).flatten(2).flatten(0, 1))
    return total.view_as(rows).unflatten(2, (old.shape[1], -1)).transpose(1, 2)


def _refuse_others(ctx: Context) -> None:
    """InputError where something else wraps whole blocks: it would take the active tokens for all of them."""
    others = sorted({path for path, _ in ctx.taps if path.startswith("blocks.") and path.count(".") == 1})
    if others:
        raise InputError(
            f"{', '.join(others)} are tapped by something else, which would see some of the tokens only: region_adaptive does "
            "not go together with a cache of blocks or with token merging"
        )


def _kept(ctx: Context, name: str) -> Any:
    if name not in ctx.memory:
        raise InputError(
            f"step {ctx.run.step} is the first in its branch of the guidance, and nothing is kept there to complete some tokens "
            f"with: make it in full, resets=({ctx.run.step}, ...)"
        )
    return ctx.memory[name]


@register("region-adaptive")
def region_adaptive(
    ratio: float = 0.5,
    start: int = 4,
    resets: Sequence[int] = (),
    *,
    metric: str = "std",
    high: float = 0.3,
    starvation: float = 1.0,
    exact: bool = False,
    keys: bool = True,
) -> Guidance:
    """Run a diffusion transformer on the share ``ratio`` of the tokens that are in focus; no training.

    The others keep the network's last output for them, and their keys and values stay to be attended to. What is in focus
    is read off the prediction of the call before (:func:`focus`, :func:`choose`), an item's own.

    start       calls that are made in full at the beginning, at least 1; ``resets`` are further ones, counted from 0
    metric      "std" or "norm" of the channels, or "random" (for comparison, drawn from the item's stream)
    high        share of the skipped tokens that are those of largest change, not of smallest; 0 keeps what changes most
    starvation  how fast a skipped token is preferred again; ``exact``: the released rule, see :func:`choose`
    keys        False: attention sees the active tokens only (for comparison)

    Put it around guidance, ``region_adaptive()(cfg(3.0)(denoiser))``: one choice by the guided prediction, for all readings,
    each with its own keys and values. Inside it every reading chooses for itself. ratio = 1 is the plain network to
    round-off. For solvers that call once a step, of low order (others see kept predictions as their history); the
    published settings are 28 steps, resets=(12, 20). Raises InputError where a gradient is asked for, and for networks
    other than sfumato's DiT. Source: Liu, Yang, Zhang, Zhang, Qiu, You, Yang, 2025, "Region-Adaptive Sampling for Diffusion
    Transformers".
    """
    if not 0 < ratio <= 1:
        raise InputError(f"ratio = {ratio}: above 0, at most 1")
    if not (isinstance(start, int) and start >= 1):
        raise InputError(f"start = {start}: at least 1, the choice is read off a call in full")
    if not all(isinstance(step, int) and step >= 0 for step in resets):
        raise InputError(f"resets = {tuple(resets)}: numbers of steps, the first is 0")
    if metric not in METRICS:
        raise InputError(f"metric = {metric!r}: one of {', '.join(METRICS)}")
    if not (0 <= high <= 1 and starvation >= 0):
        raise InputError(f"high = {high}, starvation = {starvation}: from 0 to 1, and not negative")
    full = start, frozenset(resets)
    return lambda inner: RegionAdaptive(inner, ratio, full, metric, high, starvation, exact, keys)


__all__ = ["RegionAdaptive", "choose", "focus", "region_adaptive"]
