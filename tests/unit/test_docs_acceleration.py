"""docs/acceleration.md says what its measurements hold, and names every acceleration."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from sfumato import acceleration

DOCS = Path(__file__).parents[2] / "docs"
DATA, PARETO, ENGINES = (
    json.loads((DOCS / f"{name}.json").read_text("utf-8")) for name in ("acceleration", "pareto", "engines")
)


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("docs_acceleration", DOCS / "acceleration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_measurements(pages):
    assert (DOCS / "acceleration.md").read_text("utf-8") == pages.page(DATA, PARETO, ENGINES), "run `make docs`"
    assert (DOCS / "pareto.png").stat().st_size > 10_000


def test_every_acceleration_is_on_the_page_and_the_command_is_the_one_that_measured(pages):
    page = pages.page(DATA, PARETO, ENGINES)
    for name in acceleration.names():
        assert f"`{name}`" in page
    made = {row["solver"] for row in PARETO["rows"]}
    for asked in ("emoji-latent-4", "emoji-latent-1", "ddim", "arc"):
        assert asked in made and f" {asked}" in pages.COMPARED


def test_the_front_holds_what_nothing_beats_in_quality_and_seconds():
    rows = [row for row in PARETO["rows"] if "quality" in row]
    sign = -1 if rows[0]["quality"]["higher_is_better"] else 1
    for row in rows:
        beaten = any(
            r["seconds"] < row["seconds"] and sign * r["quality"]["value"] < sign * row["quality"]["value"]
            for r in rows
        )
        assert (row["front"] in ("seconds", "both")) != beaten


def test_another_measurement_makes_another_page(pages):
    changed = json.loads(json.dumps(DATA))
    changed["rows"][-1]["speed"] = 77.0
    assert "77.00 x" in pages.page(changed, PARETO, ENGINES)


def test_engines_are_measured_beside_the_full_network_of_the_same_run(pages):
    for run in ENGINES["runs"]:
        base = run["rows"][0]
        assert base["engine"] == "full precision" and base["error"] == 0
        for row in run["rows"]:
            assert row["speed"] == pytest.approx(base["seconds"] / row["seconds"])
            assert f"| {run['threads']} | {row['engine']} |" in pages.page(DATA, PARETO, ENGINES)
