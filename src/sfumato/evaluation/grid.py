"""Every combination of some choices, measured: the ablation table of a recipe."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sfumato.core.errors import InputError
from sfumato.evaluation.table import Table


def grid(
    axes: Mapping[str, Sequence[Any] | Mapping[str, Any]], run: Callable[..., Mapping[str, Any]], *, title: str = ""
) -> Table:
    """Call ``run(**cell)`` for every combination of the axes, last axis fastest; a row is the cell and its figures.

    An axis is a sequence of choices, or a mapping of label to choice where the choice is an object. Text, numbers,
    bools and None label themselves, other choices by their ``name`` or ``__name__``. ``run`` returns a mapping of
    figure names to numbers or Measurements.

    >>> grid({"steps": [5, 10], "solver": ["ddim", "heun"]}, lambda steps, solver: {"error": 1 / steps})

    Raises:
        InputError: no axes, an empty axis, two choices of one label, or figures that are not a mapping with new names.
    """
    if not axes:
        raise InputError("axes are empty: name at least one, such as {'steps': [5, 10]}")
    labelled = {name: _labelled(name, choices) for name, choices in axes.items()}
    rows = []
    for cell in itertools.product(*(choices.items() for choices in labelled.values())):
        labels = dict(zip(labelled, (label for label, _ in cell), strict=True))
        try:
            figures = run(**dict(zip(labelled, (choice for _, choice in cell), strict=True)))
        except Exception as error:
            error.add_note(f"in the cell {labels}")
            raise
        if not isinstance(figures, Mapping) or set(figures) & set(labels):
            raise InputError(f"cell {labels}: a mapping of figures is wanted, with no name of an axis, got {figures!r}")
        rows.append({**labels, **figures})
    return Table(rows, title)


def _labelled(name: str, choices: Sequence[Any] | Mapping[str, Any]) -> dict[Any, Any]:
    if isinstance(choices, str) or not isinstance(choices, Sequence | Mapping):
        raise InputError(f"axis {name!r}: a list of choices or a mapping of label to choice is wanted, got {choices!r}")
    pairs = list(choices.items()) if isinstance(choices, Mapping) else [(_label(choice), choice) for choice in choices]
    found: dict[Any, Any] = {}
    for label, choice in pairs:
        # 1, 1.0 and True are equal keys of a dict, and would be one cell.
        if label in found:
            raise InputError(f"axis {name!r}: two choices are labelled {label!r}; give a mapping of label to choice")
        found[label] = choice
    if not found:
        raise InputError(f"axis {name!r} has no choices")
    return found


def _label(choice: Any) -> Any:
    if choice is None or isinstance(choice, str | int | float | bool):
        return choice
    return str(getattr(choice, "name", None) or getattr(choice, "__name__", None) or choice)
