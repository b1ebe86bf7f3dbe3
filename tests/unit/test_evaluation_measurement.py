"""Measurements, their intervals, tables and grids."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfumato.core.errors import InputError, MissingExtra
from sfumato.evaluation import Measurement, Table, grid
from sfumato.evaluation import measurement as e


def draw(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_student_quantiles_equal_scipy() -> None:
    from scipy.stats import t

    for freedom in (1, 2, 3, 4.5, 9, 30, 1e6):
        for p in (0.6, 0.9, 0.975):
            assert e.student_quantile(p, freedom) == pytest.approx(t.ppf(p, freedom), rel=2e-3)
            assert e.student_quantile(1 - p, freedom) == pytest.approx(t.ppf(1 - p, freedom), rel=2e-3)


def test_wilson_and_median_intervals_equal_scipy() -> None:
    from scipy.stats import binomtest, quantile_test

    for hits, n in ((0, 10), (3, 10), (10, 10), (480, 1000), (1, 1)):
        theirs = binomtest(hits, n).proportion_ci(0.95, "wilson")
        assert e.wilson_interval(hits / n, n)[:2] == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    for n in (6, 11, 40, 301):
        x = draw(n, n)
        theirs = quantile_test(x.numpy(), q=0, p=0.5).confidence_interval(0.95)
        assert e.median_interval(x)[:2] == pytest.approx((theirs.low, theirs.high))
    assert e.median_interval(draw(5, 0))[:2] == (-math.inf, math.inf)


def test_intervals_cover_at_about_their_level() -> None:
    """400 repetitions each: a true rate of 0.95 stays within 0.915..0.985 but for 1 in 1,000."""

    def rate(interval, exact: float) -> float:
        return sum(f.low <= exact <= f.high for f in map(interval, range(400))) / 400

    assert 0.915 <= rate(lambda s: e.student_interval(draw(15, s)), 0.0) <= 0.985
    assert 0.915 <= rate(lambda s: e.wilson_interval((draw(60, s) < -1).double().mean().item(), 60), 0.158655) <= 0.985
    assert 0.915 <= rate(lambda s: e.median_interval(draw(40, s).exp()), 1.0) <= 0.995
    spread = lambda s: e.bootstrap_interval(lambda x: x.std(), draw(80, s), seed=s)  # noqa: E731
    assert 0.88 <= rate(spread, 1.0) <= 0.985


def test_jackknife_of_means_is_the_two_sample_interval() -> None:
    """Leaving single items out of a difference of means gives s^2/n + s'^2/m, and Welch's degrees of freedom."""
    from scipy.stats import ttest_ind

    x, y = draw(12, 0), 2 * draw(9, 1) + 1
    left = [(z.sum() - z) / (len(z) - 1) for z in (x, y)]
    value = (x.mean() - y.mean()).item()
    found = e.jackknife_interval(value, left[0] - y.mean(), x.mean() - left[1])
    theirs = ttest_ind(x.numpy(), y.numpy(), equal_var=False).confidence_interval(0.95)
    assert found[:2] == pytest.approx((theirs.low, theirs.high), rel=1e-3)
    assert e.jackknife_interval(3.0, torch.zeros(5))[:2] == (3.0, 3.0)


def test_bootstrap_is_a_function_of_the_seed() -> None:
    x = draw(50, 0)
    assert e.bootstrap_interval(torch.mean, x, seed=1) == e.bootstrap_interval(torch.mean, x, seed=1)
    assert e.bootstrap_interval(torch.mean, x, seed=1) != e.bootstrap_interval(torch.mean, x, seed=2)
    with pytest.raises(InputError, match="resamples"):
        e.bootstrap_interval(torch.mean, x, resamples=5)
    with pytest.raises(InputError, match="level"):
        e.bootstrap_interval(torch.mean, x, level=1.5)


def test_measurements_of_items() -> None:
    found = Measurement.mean("error", torch.tensor([1.0, 2.0, 6.0]), features="none", higher_is_better=False)
    assert (found.value, found.n) == (3.0, 3) and found.low < 3 < found.high
    assert Measurement.median("error", torch.tensor([5.0, 1.0, 2.0, 100.0])).value == 3.5
    assert Measurement.share("hits", torch.ones(10)).high == 1
    endless = Measurement.mean("PSNR", torch.tensor([30.0, math.inf]))
    assert endless.value == math.inf and "1 of 2" in endless.interval
    assert Measurement.mean("error", torch.ones(1)).low == -math.inf
    for bad, words in (
        (torch.ones(2, 2), r"\(2, 2\)"),
        (torch.ones(0), "N >= 1"),
        (torch.tensor([1, math.nan]), "1 of 2"),
        ([1.0], "list"),
    ):
        with pytest.raises(InputError, match=words):
            Measurement.mean("error", bad)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        Measurement.share("hits", torch.tensor([2.0]))


@pytest.mark.parametrize("name", ["FID", "fid", "FID-10k", "clean-fid", "my FID score"])
def test_no_figure_is_called_after_the_inception_distance(name: str) -> None:
    with pytest.raises(InputError, match="frechet"):
        Measurement(name, 1.0, 0.0, 2.0, 10)
    assert Measurement("fidelity", 1.0, 0.0, 2.0, 10).name == "fidelity"


numbers = st.floats(allow_nan=False)


@given(value=numbers, low=numbers, high=numbers, better=st.sampled_from([True, False, None]), n=st.integers(1, 10**9))
def test_rows_survive_strict_json_and_print_on_one_line(value, low, high, better, n) -> None:
    before = Measurement("figure", value, low, high, n, 5, "pca-3", "held-out", better, "95 % Student", "a note")
    row = json.loads(json.dumps(before.row(), allow_nan=False))
    assert Measurement.from_row(row) == before
    assert "\n" not in str(before) and str(before).startswith("figure ")


def test_a_row_must_be_of_a_measurement() -> None:
    with pytest.raises(InputError, match="low"):
        Measurement.from_row({"name": "a", "value": 1, "high": 2, "n": 3})
    with pytest.raises(InputError, match="not a number"):
        Measurement("a", math.nan, 0, 1, 3)


FIGURES = [
    Measurement("precision", 0.5, 0.4, 0.6, 100, 90, "pixels", "held-out", True, "95 % Wilson", "k = 3"),
    Measurement("frechet distance", 12.0, 10.0, math.inf, 100, 90, "pixels", "held-out", False),
]


@pytest.mark.parametrize(
    "rows", [FIGURES, [], [{"steps": 5, "error": FIGURES[0], "best": None}, {"steps": 8, "x": "a|b"}]]
)
def test_tables_are_saved_whole_and_read_back(rows, tmp_path) -> None:
    table = Table(rows, "figures")
    assert Table.load(table.save(tmp_path / "t.json")) == table
    assert json.loads(table.json()) == {"title": "figures", "rows": list(table.rows)}
    table.save(tmp_path / "t.csv")
    table.save(tmp_path / "t.md")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv", "t.json", "t.md"]


def test_a_table_reads_as_one(capsys, tmp_path) -> None:
    import csv

    table = Table(FIGURES, "figures")
    assert table["precision"] == FIGURES[0] and table["frechet distance"] == FIGURES[1]
    table.show()
    printed = capsys.readouterr().out
    assert all(
        words in printed for words in ("precision", "0.5 [0.4, 0.6]", "features: pixels; reference:", "held-out")
    )
    cells = Table([{"steps": s, "solver": v, "error": FIGURES[0]} for s in (5, 8) for v in ("a", "b")])
    assert cells.where(steps=5, solver="b").rows == (cells.rows[1],)
    assert cells.column("error") == [FIGURES[0]] * 4
    rows = list(csv.DictReader(cells.csv().splitlines()))
    assert rows[0] == {"steps": "5", "solver": "a", "error": "0.5", "error low": "0.4", "error high": "0.6"}
    assert cells.markdown().splitlines()[2] == "| 5 | a | 0.5 [0.4, 0.6] |"
    for call, words in (
        (lambda: table["recall"], "there are: precision"),
        (lambda: cells.column("nothing"), "steps, solver"),
        (lambda: cells.where(nothing=1), "nothing"),
        (lambda: table.save(tmp_path / "t.xlsx"), ".csv"),
        (lambda: table.save(tmp_path / "absent" / "t.json"), "make it first"),
        (lambda: Table([{"a": torch.ones(2)}]), "item"),
        (lambda: Table([{"a": math.nan}]), "NaN"),
    ):
        with pytest.raises(InputError, match=words):
            call()
    (tmp_path / "broken.json").write_text('{"rows": [')
    with pytest.raises(InputError, match=r"broken\.json"):
        Table.load(tmp_path / "broken.json")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    import os

    path = Table(FIGURES, "old").save(tmp_path / "t.json")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Table(FIGURES, "new").save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"] and Table.load(path).title == "old"


def test_showing_names_the_extra(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(MissingExtra, match="rich"):
        Table(FIGURES).show()


def test_a_grid_runs_every_combination_in_order() -> None:
    class Solver:
        name = "heun"

    seen = []

    def run(steps: int, solver: object) -> dict:
        seen.append((steps, solver))
        return {"error": 1 / steps, "share": Measurement.share("share", torch.ones(4))}

    heun = Solver()
    table = grid({"steps": [5, 10], "solver": [heun, "ddim"]}, run, title="ablation")
    assert seen == [(5, heun), (5, "ddim"), (10, heun), (10, "ddim")]
    assert [(row["steps"], row["solver"]) for row in table] == [(5, "heun"), (5, "ddim"), (10, "heun"), (10, "ddim")]
    assert table.where(steps=10).column("error") == [0.1, 0.1]
    assert table.column("share")[0] == Measurement.share("share", torch.ones(4))
    assert grid({"w": {"low": 0.1, "high": 9.0}}, lambda w: {"w2": w * w}).column("w") == ["low", "high"]


def test_a_grid_refuses_what_it_cannot_label_and_names_the_failing_cell() -> None:
    for axes, words in (
        ({}, "axes are empty"),
        ({"a": []}, "no choices"),
        ({"a": "text"}, "'a'"),
        ({"a": 3}, "'a'"),
        ({"a": [1, True]}, "mapping of label to choice"),
        ({"a": [lambda: 1, lambda: 2]}, "<lambda>"),
    ):
        with pytest.raises(InputError, match=words):
            grid(axes, lambda **_: {"b": 1})
    for bad in ({"a": 1}, 3.0, None):
        with pytest.raises(InputError, match="cell"):
            grid({"a": [1]}, lambda a, bad=bad: bad)

    def fails(a: int) -> dict:
        return {"b": 1 / a}

    with pytest.raises(ZeroDivisionError) as caught:
        grid({"a": [1, 0]}, fails)
    assert caught.value.__notes__ == ["in the cell {'a': 0}"]
