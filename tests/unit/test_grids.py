"""Grids: times that fall strictly from exactly start to exactly stop, whatever the schedule and the number of steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sfumato import grids, oracles, solvers
from sfumato.core import InputError, trajectory
from sfumato.processes import DDPM, EDM, VE, VP, Cosine, Flow

PROCESSES = {
    "vp": VP(),
    "ve": VE(),
    "edm": EDM(),
    "flow": Flow(),
    "flow-shift-3": Flow(3.0),
    "cosine": Cosine(),
    "ddpm-linear": DDPM("linear"),
    "ddpm-scaled-linear": DDPM("scaled_linear"),
    "ddpm-cosine": DDPM("cosine"),
}
every_process = pytest.mark.parametrize("law", list(PROCESSES))
every_grid = pytest.mark.parametrize("name", grids.names())


def falls(times: torch.Tensor, n: int, start: float, stop: float, fair: bool = True) -> None:
    assert times.dtype == torch.float64 and times.shape == (n + 1,)
    assert float(times[0]) == start and float(times[-1]) == stop, "ends are exact"
    gaps = times[:-1] - times[1:]
    assert (gaps > 0).all()
    assert not fair or gaps.min() > 1e-9 * gaps.max(), "no interval is lost to rounding"


@every_process
@every_grid
@pytest.mark.parametrize("n", [1, 2, 3, 10, 50, 200])
def test_whole_runs(name: str, law: str, n: int) -> None:
    falls(grids.get(name)(PROCESSES[law], n, 1.0, 0.0), n, 1.0, 0.0)


@every_process
@every_grid
@given(n=st.integers(1, 60), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_parts_of_runs(name: str, law: str, n: int, ends: tuple[float, float]) -> None:
    """Any start and stop; where a grid has no place left for n steps it says so."""
    process, (start, stop) = PROCESSES[law], sorted(ends, reverse=True)
    assume(start - stop > 0.02)
    assume(process.coef(stop).lam > -4.5)  # beyond that, grids in lambda see no difference between times
    try:
        times = grids.get(name)(process, n, start, stop)
    except InputError as error:
        assert "discrete times" in str(error) or "cleaner already" in str(error)
        return
    on_table = name != "trailing" or all(abs(v * 1000 - round(v * 1000)) < 1e-9 for v in (start, stop))
    if on_table or n < 400 * (start - stop):
        falls(times, n, start, stop, fair=process.coef(start).lam < 4)


@every_process
@every_grid
def test_inversion_runs_the_same_times_upwards(name: str, law: str) -> None:
    process, grid = PROCESSES[law], grids.get(name)
    denoiser = oracles.Gaussian([0.0, 1.0], 0.5).denoiser(process)
    x = torch.ones(1, 2, dtype=torch.float64)
    down = [s.t for s in trajectory(denoiser, solvers.get("ddim"), grid, 7, x=x)]
    up = [s.t for s in trajectory(denoiser, solvers.get("ddim"), grid, 7, x=x, start=0.0, stop=1.0)]
    assert up == down[::-1] and down == grid(process, 7, 1.0, 0.0).tolist()


def steps_in(values: list[float]) -> list[float]:
    return [b - a for a, b in zip(values, values[1:], strict=False)]


@every_process
def test_each_spacing_is_equal_in_its_own_coordinate(law: str) -> None:
    process, n, start, stop = PROCESSES[law], 9, 0.97, 0.4
    lam = {
        name: [process.coef(float(t)).lam for t in grids.get(name)(process, n, start, stop)] for name in grids.names()
    }
    assert min(lam["uniform"]) > -5.1
    coordinates = {
        "logsnr": lam["logsnr"],
        "karras": [math.exp(-v / 7) for v in lam["karras"]],
        "arctan": [math.atan((v - 0.75) / 2.25) for v in lam["arctan"]],
        "uniform": grids.get("uniform")(process, n, start, stop).tolist(),
        "quadratic": [math.sqrt(t - stop) for t in grids.get("quadratic")(process, n, start, stop).tolist()],
    }
    for name, values in coordinates.items():
        gaps = steps_in(values)
        assert gaps == pytest.approx([gaps[0]] * n, rel=1e-6), name


@every_process
@pytest.mark.parametrize(("name", "lam_max"), [("logsnr", 5.0), ("karras", 6.2), ("arctan", 5.0)])
def test_the_last_evaluation_before_clean_data(name: str, lam_max: float, law: str) -> None:
    process = PROCESSES[law]
    low = getattr(process, "sigma_min", None)
    expected = -math.log(low) if name == "karras" and low else lam_max
    last = float(grids.get(name)(process, 8, 1.0, 0.0)[-2])
    assert process.coef(last).lam == pytest.approx(expected, rel=1e-6)


def test_karras_is_equation_5() -> None:
    for process in (EDM(), EDM(0.01, 120.0, 5.0)):
        n, low, high = 18, process.sigma_min, process.sigma_max
        times = grids.get("karras")(process, n, 1.0, 0.0)
        expected = [(high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(n)]
        assert [process.coef(float(t)).sigma for t in times[:-1]] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("law", ["ddpm-linear", "ddpm-scaled-linear", "ddpm-cosine"])
@given(n=st.integers(1, 1000))
def test_trailing_visits_the_tables_own_times(law: str, n: int) -> None:
    process = PROCESSES[law]
    times = grids.get("trailing")(process, n, 1.0, 0.0)
    falls(times, n, 1.0, 0.0)
    indices = [round(float(t) * 1000) for t in times]
    assert times.tolist() == [i / 1000 for i in indices]
    assert indices == [round(1000 * (1 - i / n)) for i in range(n + 1)] or n not in (1, 2, 4, 5, 10, 20, 50, 100, 1000)
    for t, i in zip(times.tolist()[:-1], indices, strict=False):
        assert process.coef(t).angle == pytest.approx(process.angles[i], abs=1e-14)


def test_trailing_uses_the_tables_own_number_of_steps() -> None:
    process = DDPM(torch.linspace(0.01, 0.3, 20))
    assert grids.get("trailing")(process, 5, 1.0, 0.0).tolist() == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert grids.get("trailing", steps=10)(VP(), 10, 1.0, 0.0).tolist() == [(10 - i) / 10 for i in range(11)]
    assert grids.get("trailing")(DDPM(), 200, 0.3, 0.1).shape == (201,)
    with pytest.raises(InputError, match="21 steps between t = 1.0 and 0.0 of a schedule with 20 discrete times"):
        grids.get("trailing")(process, 21, 1.0, 0.0)


def test_fixed_times() -> None:
    grid = grids.fixed([0.9, 0.5, 0.2])
    assert grid(VP(), 2, 0.9, 0.2).tolist() == [0.9, 0.5, 0.2]
    for n, start, stop in ((3, 0.9, 0.2), (2, 1.0, 0.2), (2, 0.9, 0.0)):
        with pytest.raises(InputError, match="a fixed grid of 2 steps from 0.9 to 0.2 cannot serve"):
            grid(VP(), n, start, stop)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("quadratic", {"power": 0.0}),
        ("quadratic", {"power": math.nan}),
        ("karras", {"rho": 0.0}),
        ("arctan", {"width": -1.0}),
    ],
)
def test_impossible_numbers_are_refused(name: str, numbers: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a positive number"):
        grids.get(name, **numbers)


def test_a_start_cleaner_than_the_grid_reaches_says_what_to_do() -> None:
    with pytest.raises(InputError, match="start = 0.2 is cleaner already than the grid's lam_max: raise it"):
        grids.get("logsnr")(EDM(), 5, 0.2, 0.0)
    falls(grids.get("logsnr", lam_max=9.0)(EDM(), 5, 0.2, 0.0), 5, 0.2, 0.0)


@pytest.mark.parametrize("n", [2, 5, 10, 20])
def test_arc_leaves_a_last_step_that_shrinks_with_the_number_of_steps(n: int) -> None:
    """The last step begins at lambda = 1.7 log n - 0.3, and the others are equal in arctan((lambda - 0.6) / 2.1)."""
    process = VP()
    lams = [process.coef(t).lam for t in grids.get("arc")(process, n, 1.0, 0.0).tolist()]
    assert lams[-2] == pytest.approx(1.7 * math.log(n) - 0.3)
    gaps = steps_in([math.atan((lam - 0.6) / 2.1) for lam in lams[:-1]])
    assert gaps == pytest.approx([gaps[0]] * (n - 1), rel=1e-3)
