"""docs/editing.md says what docs/editing.json holds, and names every method."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from sfumato import editing

ROOT = Path(__file__).parents[2]
DATA, FEW = (json.loads((ROOT / "docs" / f"{name}.json").read_text("utf-8")) for name in ("editing", "editing-8"))


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("docs_editing", ROOT / "docs" / "editing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_measurements(pages):
    assert (ROOT / "docs" / "editing.md").read_text("utf-8") == pages.page(DATA, FEW), "run `make docs`"


def test_every_method_is_on_the_page_and_measured_where_it_can_be(pages):
    page = pages.page(DATA, FEW)
    measured = {row["method"] for row in DATA["rows"]}
    for name in editing.names():
        assert f"`{name}`" in page
        if {"prompt"} <= editing.get(name).needs <= {"prompt", "source"}:
            assert name in measured, f"{name}: run `python -m benchmarks.editing --json docs/editing.json`"


def test_another_measurement_makes_another_page(pages):
    changed = json.loads(json.dumps(DATA))
    row = next(row for row in changed["rows"] if "distance" in row)
    row["distance"]["value"] = 7.77
    assert "7.77" in pages.page(changed, FEW) and "7.77" not in pages.page(DATA, FEW)
