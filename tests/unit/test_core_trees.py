"""Linear combinations of states: tensors, nested trees, coefficients of every shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.core import column, first, linear, tree_map

finite = st.floats(-3, 3, allow_nan=False)


@given(st.lists(st.tuples(finite, st.integers(0, 2**31)), min_size=1, max_size=5), st.integers(0, 3))
def test_linear_is_the_sum_of_its_terms(terms: list[tuple[float, int]], rank: int) -> None:
    shape = (2, 3, 1, 2)[: rank + 1]
    states = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for _, seed in terms
    ]
    flat = [v for (c, _), x in zip(terms, states, strict=True) for v in (c, x)]
    kept = [x.clone() for x in states]
    assert torch.allclose(
        linear(*flat), sum((c * x for (c, _), x in zip(terms, states, strict=True)), torch.zeros(shape))
    )
    assert all(torch.equal(x, k) for x, k in zip(states, kept, strict=True)), "an input was written into"


@given(st.lists(finite, min_size=3, max_size=3), st.lists(finite, min_size=3, max_size=3))
def test_coefficients_an_item(a: list[float], b: list[float]) -> None:
    x, y = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)
    rows = linear(torch.tensor(a).double(), x, torch.tensor(b).double(), y)
    for i in range(3):
        assert torch.allclose(rows[i], float(torch.tensor(a[i])) * x[i] + float(torch.tensor(b[i])) * y[i])


def test_trees_take_numbers_and_mappings_of_numbers() -> None:
    x = {"image": torch.ones(2, 3), "pose": {"turn": torch.full((2, 1), 2.0), "shift": torch.full((2,), 3.0)}}
    y = tree_map(lambda v: 10 * v, x)
    out = linear(0.5, x, {"image": 1.0, "pose": {"turn": 0.0, "shift": torch.tensor([1.0, 2.0])}}, y)
    assert torch.equal(out["image"], torch.full((2, 3), 10.5))
    assert torch.equal(out["pose"]["turn"], torch.full((2, 1), 1.0))
    assert torch.equal(out["pose"]["shift"], torch.tensor([31.5, 61.5]))
    assert first(out) is out["image"] and first({"a": {"b": 1}}) == 1


def test_terms_of_weight_0_are_never_touched() -> None:
    x, bad = torch.ones(2, 2), torch.full((2, 2), math.inf)
    assert torch.equal(linear(2.0, x, 0.0, bad), 2 * x)
    assert torch.equal(linear(0.0, bad, 0, bad * math.nan), torch.zeros(2, 2))
    assert torch.equal(linear(1.0, x, -1.0, None), x)
    tree = linear(0.0, {"a": bad}, 1.0, {"a": x})
    assert torch.equal(tree["a"], x)


def test_a_weight_of_1_keeps_tokens_tokens() -> None:
    tokens = torch.tensor([[1, 2], [3, 4]])
    assert linear(1.0, tokens, 0.0, tokens).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_a_coefficient_never_changes_the_dtype_of_a_state(dtype: torch.dtype) -> None:
    x = torch.ones(3, 2, dtype=dtype)
    per_item = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    assert linear(0.3, x, per_item, x).dtype == dtype
    assert column(per_item, x).shape == (3, 1) and column(per_item, x).dtype == dtype
    assert column(per_item, torch.ones(3)).shape == (3,)
    assert column(2.5, x) == 2.5


def test_a_coefficient_on_the_host_serves_a_state_on_a_device() -> None:
    x = torch.empty(3, 2, device="meta")
    assert linear(torch.ones(3).double(), x, 0.5, x).device.type == "meta"


def test_linear_is_differentiable_in_states_and_coefficients() -> None:
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    c = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, x: linear(c, x, 2.0, x), (c, x))


def test_mismatched_terms_are_an_error() -> None:
    with pytest.raises(ValueError):
        linear(1.0, torch.ones(2), 2.0)
    with pytest.raises(KeyError):
        linear(1.0, {"a": torch.ones(2)}, 1.0, {"b": torch.ones(2)})
