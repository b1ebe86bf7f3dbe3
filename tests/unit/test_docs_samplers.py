"""docs/samplers.md says what docs/samplers.json holds, and the figures in there follow from its rows."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DATA = json.loads((ROOT / "docs" / "samplers.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def samplers():
    spec = importlib.util.spec_from_file_location("docs_samplers", ROOT / "docs" / "samplers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_measurements(samplers):
    assert (ROOT / "docs" / "samplers.md").read_text("utf-8") == samplers.page(DATA), "run `make docs`"
    assert (ROOT / "docs" / "samplers.png").stat().st_size > 10_000


def test_another_measurement_makes_another_page(samplers):
    changed = json.loads(json.dumps(DATA))
    row = next(row for row in changed["ratios"] if row["case"] == "digits" and row["calls"] == 10)
    row["ours"], row["ratio"] = 7.7, 99.0
    page = samplers.page(changed)
    assert "7.7 / " in page and "| digits | 10 |" in page.split("### Where a peer wins")[1].split("###")[0]


def test_ratios_and_summary_follow_from_the_rows():
    cells = {}
    for row in DATA["rows"]:
        if "median" in row:
            assert row["calls"] <= row["budget"]
            cells.setdefault((row["case"], row["budget"]), []).append(row)
    ratios = []
    for row in DATA["ratios"]:
        here = cells[row["case"], row["calls"]]
        own = next(r["median"] for r in here if (r["who"], r["sampler"]) == ("sfumato", "arc"))
        peer = min(r["median"] for r in here if r["who"] == "diffusers")
        assert row["ratio"] == pytest.approx(own / peer, rel=1e-3)
        ratios.append(own / peer)
    assert len(ratios) == len(cells)
    assert DATA["summary"]["geometric mean"] == pytest.approx(
        math.exp(sum(map(math.log, ratios)) / len(ratios)), rel=1e-3
    )
    assert DATA["summary"]["worst"] == pytest.approx(max(ratios), rel=1e-3)
    for row in DATA["tuned"]:
        peer = min(r["median"] for r in cells[row["case"], row["budget"]] if r["who"] == "diffusers")
        assert row["ratio"] == pytest.approx(row["median"] / peer, rel=1e-3) and row["calls"] <= row["budget"]


def test_the_second_reading_follows_from_the_rows(samplers):
    """Our best of the fixed settings over their best, in both files, from no more settings than theirs at any place."""
    peers = json.loads((ROOT / "docs" / "samplers-peers.json").read_text("utf-8"))
    for data in (DATA, peers):
        cells = {}
        for row in data["rows"]:
            if "median" in row:
                cells.setdefault((row["case"], row["budget"]), []).append(row)
        for row in data["best ratios"]:
            here = cells[row["case"], row["calls"]]
            mine = [r for r in here if r["who"] == "sfumato" and r["sampler"] in DATA["settings"]]
            theirs = [r for r in here if r["who"] != "sfumato"]
            assert len(mine) <= len(theirs) and all(r["calls"] <= r["budget"] for r in here)
            best = min(mine, key=lambda r: r["median"])
            assert row["sampler"] == best["sampler"]
            assert row["ratio"] == pytest.approx(best["median"] / min(r["median"] for r in theirs), rel=1e-3)
        ratios = [row["ratio"] for row in data["best ratios"]]
        assert len(ratios) == len(cells) == len(data["ratios"])
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        assert data["best summary"]["geometric mean"] == pytest.approx(mean, rel=1e-3)
        assert data["best summary"]["above 1"] == sum(r > 1 for r in ratios)


def test_the_tuned_are_compared_with_the_best_of_all(samplers):
    d = {"tuned": [{"case": "a", "budget": 5, "median": 1.0}, {"case": "a", "budget": 8, "median": 2.0}]}
    peers = {"ratios": [{"case": "a", "calls": 5, "peer": 2.0}, {"case": "a", "calls": 8, "peer": 16.0}]}
    assert samplers.tuned_over_all(d, peers) == "0.250 in the geometric mean over 2 places, worst 0.50 (a, 5 calls)"


@pytest.mark.parametrize(
    ("mean", "worst", "said"),
    [
        (0.3, 0.9, "kept"), (0.3, 2.0, "missed: the mean is kept, 3 of 40 are above 1"),
        (0.4, 0.9, "missed: the mean is missed, 3 of 40 are above 1"),
    ],
)  # fmt: skip
def test_the_verdict_says_which_half_is_missed(samplers, mean, worst, said):
    found = {"geometric mean": mean, "worst": worst, "above 1": 3, "of": 40}
    assert samplers.verdict(found, {"geometric mean": 0.35, "worst": 1.0}) == said


def test_a_row_can_be_measured_again(monkeypatch):
    """The reference ends of a Gaussian are its exact transport, and DDIM on it gives the kept figure."""
    monkeypatch.syspath_prepend(str(ROOT))
    pytest.importorskip("diffusers", reason="the benchmark compares with diffusers")
    from benchmarks import solvers, solvers_cases

    try:
        case = solvers_cases.exact("Gaussian, spectrum")
        begin, end = (case.denoiser.process.coef(t) for t in (1.0, 0.0))
        truth = case.denoiser.distribution.transport(case.x.double(), begin, end)
        assert torch.allclose(case.ends, truth, atol=1e-6)
        kept = next(
            r for r in DATA["rows"] if (r["case"], r["sampler"], r["budget"]) == (case.name, "ddim", 10)
        )  # fmt: skip
        assert solvers.ours(case, "ddim", 10)["median"] == pytest.approx(kept["median"], rel=0.02)
        for row in solvers.settings(case, (10,)):
            kept = next(
                r for r in DATA["rows"] if (r["case"], r["sampler"], r["budget"]) == (case.name, row["sampler"], 10)
            )
            assert row["median"] == pytest.approx(kept["median"], rel=0.02)
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "benchmarks"]:
            del sys.modules[name]


def test_every_link_of_the_page_leads_somewhere():
    page = (ROOT / "docs" / "samplers.md").read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target
