"""States are tensors or named trees of tensors; everything that moves a state is a linear combination."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = "Tensor | Mapping[str, State]"
Times: TypeAlias = "float | Tensor | Mapping[str, Times]"


def tree_map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply ``fn`` leaf by leaf; the other arguments are trees of the same names, or one value for all leaves."""
    if isinstance(tree, Mapping):
        return {k: tree_map(fn, v, *(r[k] if isinstance(r, Mapping) else r for r in rest)) for k, v in tree.items()}
    return fn(tree, *rest)


def first(tree: Any) -> Any:
    """The first leaf of a tree: it tells batch size, dtype and device."""
    while isinstance(tree, Mapping):
        tree = next(iter(tree.values()))
    return tree


def column(c: Any, x: Tensor) -> Any:
    """A per-item coefficient (B,) shaped, cast and moved to multiply x (B, *); numbers and full shapes pass."""
    if isinstance(c, Tensor):
        c = c.to(x) if x.is_floating_point() or x.is_complex() else c.to(x.device)
        return c.view(-1, *[1] * (x.ndim - 1)) if c.ndim == 1 and x.ndim > 1 else c
    return c


def linear(*terms: Any) -> Any:
    """``linear(c1, x1, c2, x2, ...)`` = c1 x1 + c2 x2 + ..., on tensors or trees.

    A coefficient is a number, a tensor (B,) of one number an item, a tensor that broadcasts, or a mapping of those by
    component. A term whose coefficient is the number 0, or whose state is None, is dropped, so an infinite or undefined
    state is never touched. Out of place: safe under autograd, jvp and vmap.
    """
    for x in terms[1::2]:
        if isinstance(x, Mapping):
            return {k: linear(*(u[k] if isinstance(u, Mapping) else u for u in terms)) for k in x}
    out: Any = None
    for c, x in zip(terms[::2], terms[1::2], strict=True):
        number = isinstance(c, (float, int))
        if x is None or (number and c == 0):
            continue
        if out is None:
            out = x if number and c == 1 else x * column(c, x)
        elif number:
            out = torch.add(out, x, alpha=c)
        else:
            out = torch.add(out, column(c, x) * x)
    return torch.zeros_like(first([x for x in terms[1::2] if x is not None][0])) if out is None else out
