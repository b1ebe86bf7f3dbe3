"""The tensors inside whatever a solver carries and a wrapper remembers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor


def walk(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """A copy of nested mappings, sequences and dataclasses with ``fn`` applied to every floating-point tensor.

    Everything else is passed by reference; a dataclass without such tensors too.
    """
    if isinstance(tree, Tensor):
        return fn(tree) if tree.is_floating_point() or tree.is_complex() else tree
    if isinstance(tree, Mapping):
        return {k: walk(fn, v) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [walk(fn, v) for v in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        before = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree) if f.init}
        if any(True for v in before.values() for _ in leaves(v)):
            return dataclasses.replace(tree, **{k: walk(fn, v) for k, v in before.items()})
    return tree


def leaves(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a tree, in the order of :func:`walk`."""
    found: list[Tensor] = []

    def keep(leaf: Tensor) -> Tensor:
        found.append(leaf)
        return leaf

    walk(keep, tree)
    return found


def rebuilt(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """The same tree with these tensors as its leaves."""
    given = iter(tensors)
    return walk(lambda _: next(given), tree)
