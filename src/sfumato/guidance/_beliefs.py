"""What every composition of conditions shares: several beliefs in one call, and their linear combinations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Posterior, linear, tree_map


def beside(name: str, sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Further sets of conditions as entries of ``cond``: set i of "negative" has its text as "negative.i/text"."""
    return {f"{name}.{i}/{key}": value for i, given in enumerate(sets) for key, value in given.items()}


def apart(cond: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the other conditions, the sets of that name in their order): undoes :func:`beside`."""
    found: dict[int, dict[str, Any]] = {}
    rest = {}
    for key, value in cond.items():
        match = re.fullmatch(rf"{name}\.(\d+)/(.+)", key)
        if match is None:
            rest[key] = value
        else:
            found.setdefault(int(match[1]), {})[match[2]] = value
    return rest, [found[i] for i in sorted(found)]


def beliefs(
    inner: Denoiser,
    x: Any,
    t: Any,
    ctx: Context,
    conditions: Mapping[str, Mapping[str, Any]],
    *,
    batched: bool = True,
    together: str = "together",
    name: str = "guidance",
) -> list[Any]:
    """The beliefs at (x, t) under each set of conditions, all with the same keys.

    batched   one call of all the rows, with one branch of the memory (``together``); else a call each, with its own
    """
    if not batched or not isinstance(x, Tensor):
        return [inner(x, t, ctx.fork(each, cond=cond)) for each, cond in conditions.items()]
    n, sets = len(x), list(conditions.values())
    stacked = {k: _stack([cond[k] for cond in sets], n, name) for k in sets[0]}
    clock = torch.cat([t] * len(sets)) if isinstance(t, Tensor) else t
    rows = torch.cat([x] * len(sets))
    post = inner(rows, clock, ctx.fork(together, cond=stacked))
    same = x if post.x is rows else None
    return [_rows(post, slice(i * n, (i + 1) * n), same) for i in range(len(sets))]


def combine(beliefs: Sequence[Any], weights: Sequence[Any]) -> Posterior:
    """sum_j w_j belief_j in the reading of the first; weights (numbers, (B,), or of a shape that broadcasts) add up to 1.

    Where inner wrappers moved the states, the pairs (x0, eps) are combined. What else it says is said by the first.
    """
    one = beliefs[0]
    for post in beliefs:
        if not isinstance(post, Posterior):
            raise InputError(f"guidance of a {type(post).__name__} belief: only Gaussian readings can be extrapolated")
    native = linear(*chain(*zip(weights, (reading(post, one.kind) for post in beliefs), strict=True)))
    x = one.x
    if any(post.x is not x for post in beliefs):
        x = linear(*chain(*zip(weights, (post.x for post in beliefs), strict=True)))
    return replace(one, native=native, x=x, var=None)


def reading(post: Posterior, kind: Any) -> Tensor:
    """A reading by its name or by its row."""
    return post.view(kind) if isinstance(kind, str) else post.at(*kind)


def like(null: Any, given: Any) -> Any:
    """A condition in the shape of the given one (one row is repeated for every item)."""
    if not isinstance(given, Tensor):
        return null
    value = torch.as_tensor(null, dtype=given.dtype, device=given.device)
    try:
        return value.expand_as(given)
    except RuntimeError:
        raise InputError(
            f"a null of shape {tuple(value.shape)} cannot stand for conditions {tuple(given.shape)}"
        ) from None


def _stack(values: Sequence[Any], n: int, name: str) -> Any:
    """One condition of all the sets below each other; what is the same object in all of them stays one."""
    if all(isinstance(v, Tensor) and v.ndim and len(v) == n for v in values):
        return torch.cat(list(values))
    if all(v is values[0] for v in values):
        return values[0]
    raise InputError(
        f"conditions that are not tensors of one row an item cannot be stacked: use {name}(..., batched=False)"
    )


def _rows(post: Posterior, items: slice, x: Tensor | None) -> Posterior:
    """The belief of some of the items, at x where that is given."""

    def cut(v: Any) -> Any:
        return v[items] if isinstance(v, Tensor) and v.ndim and len(v) == len(post.x) else v

    coef = type(post.coef)(*(cut(v) for v in post.coef))
    kind = post.kind if isinstance(post.kind, str) else (cut(post.kind[0]), cut(post.kind[1]))
    aux = {k: tree_map(cut, v) for k, v in post.aux.items()}
    return Posterior(post.native[items], kind, post.x[items] if x is None else x, coef, cut(post.var), aux)
