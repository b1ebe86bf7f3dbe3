"""Rules of checks: inequalities such as ``"ours <= 0.9 * baseline"``, read by a parser of nothing but arithmetic."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from sfumato.core.errors import InputError

BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
}
EXTREMES = (-math.inf, -1.0, 0.0, 1.0, math.inf)
HELP = (
    "write comparisons of ours, baseline and numbers with + - * / abs(), joined by 'and', e.g. 'ours <= 0.9 * baseline'"
)


def holds(rule: str, ours: float, baseline: float | None) -> bool:
    """Whether the rule is true of these figures; a figure that is not a number, or a division by zero, makes it false.

    Raises InputError for a rule that is no comparison, that leaves ``ours`` out, or that is true whatever ours is.
    """
    tree, names = _parsed(rule)
    if "baseline" in names and baseline is None:
        raise InputError(f"the rule {rule!r} compares with a baseline: give one")
    if all(_true(tree, {"ours": extreme, "baseline": 1.0}) for extreme in EXTREMES):
        raise InputError(f"the rule {rule!r} is true whatever ours is: a check must be able to fail")
    return _true(tree, {"ours": ours} if baseline is None else {"ours": ours, "baseline": baseline})


def _parsed(rule: str) -> tuple[ast.expr, set[str]]:
    """The expression of a rule and the names in it; InputError where it is no comparison of ours."""
    try:
        tree = ast.parse(rule, mode="eval").body
    except SyntaxError as error:
        raise InputError(f"the rule {rule!r} cannot be read ({error.msg}): {HELP}") from error
    parts = tree.values if isinstance(tree, ast.BoolOp) else [tree]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if not all(isinstance(part, ast.Compare) for part in parts) or "ours" not in names:
        raise InputError(f"the rule {rule!r} is no comparison of ours: {HELP}")
    _value(tree, {"ours": 0.5, "baseline": 0.25}, rule)  # refuse what is not arithmetic before a run, not after it
    return tree, names


def _true(tree: ast.expr, figures: Mapping[str, float]) -> bool:
    try:
        return bool(_value(tree, figures, ""))
    except (ZeroDivisionError, OverflowError):
        return False


def _value(node: ast.expr, figures: Mapping[str, float], rule: str) -> Any:
    """What the expression is with those figures: arithmetic, comparisons and `and`, nothing else."""
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return all([_value(part, figures, rule) for part in node.values])
    if isinstance(node, ast.Compare) and all(type(op) in BINARY for op in node.ops):
        sides = [_value(side, figures, rule) for side in (node.left, *node.comparators)]
        return all(BINARY[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False))
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return BINARY[type(node.op)](_value(node.left, figures, rule), _value(node.right, figures, rule))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, figures, rule)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name) and node.id in figures:
        return figures[node.id]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "abs" and len(node.args) == 1 and not node.keywords:
        return abs(_value(node.args[0], figures, rule))
    raise InputError(f"the rule {rule!r} holds {ast.unparse(node)!r}: {HELP}")
