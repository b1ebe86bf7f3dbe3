"""The makers of the few-step emoji models: what is asked for, and the times that a student knows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato import grids
from sfumato.core import InputError
from sfumato.processes import Flow
from sfumato.zoo import make_distilled, making


def test_requests_are_pure_functions_of_the_index() -> None:
    asked = make_distilled.Requests()
    many, two = asked(range(400)), asked([7, 3])
    assert all(torch.equal(v, many[k][[7, 3]]) for k, v in two.items())
    unnamed = (many["vendor"] == make_distilled.VENDORS).double().mean()
    silent = (~many["text_mask"].any(1)).double().mean()
    assert abs(unnamed - make_distilled.UNNAMED) < 0.07 and abs(silent - make_distilled.SILENT) < 0.03
    assert (many["vector"][~many["text_mask"].any(1)] == 0).all()


def test_students_are_made_by_name() -> None:
    assert set(make_distilled.MAKERS) <= set(making.MAKERS)
    assert set(make_distilled.BEGINS) | set(make_distilled.BEGINS.values()) == set(make_distilled.MAKERS)
    every = make_distilled.TIMES[::2]
    assert every[0] == 1.0 and every[-1] == 0.0 and len(every) == 5


@given(st.lists(st.floats(0.02, 0.98), min_size=0, max_size=5, unique_by=lambda t: round(t, 2)), st.integers(1, 12))
def test_a_piecewise_grid_has_its_own_times_and_interpolates_others(inner: list[float], n: int) -> None:
    times = (1.0, *sorted(inner, reverse=True), 0.0)
    grid = grids.get("piecewise", times=times)
    own = grid(Flow(), len(times) - 1, 1.0, 0.0)
    torch.testing.assert_close(own, torch.tensor(times, dtype=torch.float64))
    other = grid(Flow(), n, 1.0, 0.0)
    assert len(other) == n + 1 and bool((other[:-1] > other[1:]).all())
    doubled = grid(Flow(), 2 * (len(times) - 1), 1.0, 0.0)
    torch.testing.assert_close(doubled[::2], own)
    again = grids.registry.make(f"piecewise(times={times})")(Flow(), n, 1.0, 0.0)
    assert torch.equal(again, other)


def test_times_that_do_not_fall_are_refused() -> None:
    for wrong in ((1.0,), (0.9, 0.0), (1.0, 0.5, 0.5, 0.0), (0.0, 1.0)):
        with pytest.raises(InputError, match="falling"):
            grids.get("piecewise", times=wrong)
