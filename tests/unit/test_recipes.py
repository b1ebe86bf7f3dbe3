"""Recipes: rules that can fail, evidence that cannot be typed, and the list of published systems."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfumato import recipes
from sfumato.core.errors import InputError, UnknownName
from sfumato.recipes import Check, Evidence, Findings, recipe

FINITE = st.floats(-1e6, 1e6)
SLUG = "dpm-solver-pp"


def evidence(*checks: Check, **other: object) -> Evidence:
    values = {"slug": SLUG, "claim": "c", "baseline": "b", "checks": checks, "seed": 3, "seconds": 1.5, "nfe": 10.0}
    return Evidence(**(values | {"data": "d", "model": "m", "notes": "n"} | other))


@given(FINITE, FINITE, st.floats(0.1, 10))
def test_a_rule_is_the_inequality_that_it_spells(ours, baseline, factor):
    for sign, truth in {
        "<=": ours <= factor * baseline,
        "<": ours < factor * baseline,
        ">=": ours >= factor * baseline,
        ">": ours > factor * baseline,
    }.items():
        assert Check("x", ours, baseline, f"ours {sign} {factor!r} * baseline").holds is truth
    both = Check("x", ours, baseline, f"-1.5 <= ours - baseline <= {factor!r} and abs(ours) < 100").holds
    assert both is (-1.5 <= ours - baseline <= factor and abs(ours) < 100)


def test_figures_that_are_not_numbers_and_ratios_to_nothing_do_not_hold():
    assert not Check("x", math.nan, 1.0, "ours <= baseline").holds
    assert not Check("x", math.nan, 1.0, "ours >= baseline").holds
    assert not Check("x", 1.0, 0.0, "ours / baseline >= 0.5").holds
    assert Check("x", math.inf, 1.0, "ours >= baseline").holds


@pytest.mark.parametrize(
    "rule",
    [
        "ours <= ours", "abs(ours) >= 0", "1 <= 2", "baseline < 2", "ours", "True", "ours <=", "",
        "__import__('os').getcwd() == ours", "ours.real < 1", "ours < x", "ours < 1 or ours >= 1", "[ours] < [1]",
        "ours < (lambda: 1)()", "ours == 'a'", "ours < 10 if ours else ours < 1", "abs(ours, 1) < 2", "ours is 1",
    ],
)  # fmt: skip
def test_rules_that_cannot_fail_or_are_not_arithmetic_are_refused(rule):
    with pytest.raises(InputError):
        Check("x", 0.5, 1.0, rule)


def test_a_rule_with_a_baseline_needs_one():
    with pytest.raises(InputError, match="give one"):
        Check("x", 0.5, None, "ours < baseline")
    assert Check("x", 0.5, None, "ours < 1").record() == {
        "name": "x", "ours": 0.5, "baseline": None, "rule": "ours < 1", "holds": True,
    }  # fmt: skip


def test_holds_is_computed_and_never_given():
    with pytest.raises(TypeError):
        Check("x", 2.0, 1.0, "ours < baseline", True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Check("x", 2.0, 1.0, "ours < baseline").holds = True


def test_the_record_has_the_published_fields_in_their_order():
    good, bad = Check("a", 1.0, 2.0, "ours < baseline"), Check("b", 3.0, 2.0, "ours < baseline")
    found = json.loads(evidence(good, bad, nfe={"ours": 10, "baseline": 20}).json())
    assert list(found) == [
        "slug", "claim", "baseline", "checks", "holds", "seed", "seconds", "nfe", "data", "model", "notes",
    ]  # fmt: skip
    assert list(found["checks"][0]) == ["name", "ours", "baseline", "rule", "holds"]
    assert found["holds"] is False and [c["holds"] for c in found["checks"]] == [True, False]
    assert evidence(good).holds


@given(st.lists(st.tuples(st.text(), st.floats(), st.none() | st.floats()), min_size=1), st.text())
def test_evidence_is_strict_json_and_reads_back(figures, notes):
    checks = [Check(name, a, b, "ours <= 2" if b is None else "ours <= 2 * baseline") for name, a, b in figures]
    text = evidence(*checks, notes=notes).json()
    json.loads(text, parse_constant=pytest.fail)
    assert Evidence.of(text).json() == text


def test_evidence_whose_verdict_was_edited_is_refused():
    text = evidence(Check("a", 3.0, 2.0, "ours < baseline")).json()
    for wrong in (text.replace("false", "true"), text.replace('"holds": false,\n "seed"', '"holds": true,\n "seed"')):
        assert wrong != text
        with pytest.raises(InputError, match="another verdict"):
            Evidence.of(wrong)
    for foreign in ("[]", "{", '{"slug": "x"}', "null"):
        with pytest.raises(InputError, match="run reproduce again"):
            Evidence.of(foreign)


def test_no_checks_is_no_evidence():
    with pytest.raises(InputError, match="at least one"):
        evidence()


def test_running_a_recipe_fills_in_the_rest_and_keeps_it(tmp_path):
    seen = []

    @recipe(SLUG, kind="solver", claim="half the error of DDIM", baseline="ddim", citation="@misc{x}")
    def made(seed: int) -> Findings:
        seen.append(seed)
        return Findings(
            [Check("error", 0.4, 1.0, "ours <= 0.5 * baseline")], 10, "d", "m", picture=Image.new("RGB", (4, 3))
        )

    found = made.run(seed=7, out=tmp_path / "deep" / "er")
    assert seen == [7] and found.seed == 7 and found.holds and found.seconds >= 0
    assert made.title == recipes.about(SLUG).title and made.family == "solvers"
    folder = tmp_path / "deep" / "er"
    assert sorted(p.name for p in folder.iterdir()) == [f"{SLUG}.json", f"{SLUG}.png"]
    assert Evidence.of((folder / f"{SLUG}.json").read_text()) == found
    with Image.open(folder / f"{SLUG}.png") as picture:
        assert picture.size == (4, 3)


def test_a_recipe_of_an_unknown_system_or_kind_is_refused():
    with pytest.raises(UnknownName, match="dpm-solver"):
        recipe("dpm-solver-p", kind="solver", claim="", baseline="", citation="")
    with pytest.raises(InputError, match="kind"):
        recipe(SLUG, kind="magic", claim="", baseline="", citation="")


def test_all_published_systems_are_listed_once():
    listed = recipes.papers()
    assert len(listed) == len({p.slug for p in listed}) == len({p.title for p in listed}) == 109
    assert all(p.slug == p.slug.lower().replace(" ", "-").replace("_", "-") and p.title and p.family for p in listed)


def test_names_are_the_modules_of_the_folder(tmp_path, monkeypatch):
    slug = next(paper.slug for paper in recipes.papers() if paper.slug not in recipes.names())
    (tmp_path / f"{slug.replace('-', '_')}.py").write_text("raise RuntimeError('imported before it was asked for')")
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path)])
    assert slug in recipes.names()
    with pytest.raises(InputError, match="no recipe yet"):
        monkeypatch.setattr(recipes, "names", list)
        recipes.get(slug)


def test_a_module_without_its_recipe_is_named(monkeypatch):
    slug = next(paper.slug for paper in recipes.papers() if paper.slug not in recipes.names())
    module = slug.replace("-", "_")
    monkeypatch.setattr(recipes, "names", lambda: [slug])
    monkeypatch.setitem(sys.modules, f"sfumato.recipes.{module}", types.ModuleType("empty"))
    with pytest.raises(UnknownName, match=f"{module}.py"):
        recipes.get(slug)


def test_the_last_verdict_is_found_where_it_was_kept(tmp_path, monkeypatch):
    found = evidence(Check("a", 1.0, 2.0, "ours < baseline"))
    found.save(tmp_path)
    monkeypatch.setattr(recipes, "EVIDENCE", (tmp_path / "absent", tmp_path))
    assert recipes.evidence(SLUG) == found
    assert recipes.evidence("ddgan") is None
    with pytest.raises(UnknownName):
        recipes.evidence("nonsense")


def test_a_citation_says_no_more_than_is_known():
    text = recipes.citation("zero-1-to-a")
    assert text.startswith("@misc{zero-1-to-a,") and recipes.about("zero-1-to-a").title in text
    assert "author" not in text and "year" not in text


def test_networks_of_a_recipe_begin_as_its_seed_says(monkeypatch):
    """Weights that nobody seeds are those of the recipe's seed, whatever ran before, and the caller's generator goes on."""
    import torch

    from sfumato.recipes import _base

    monkeypatch.setattr(_base, "_made", {})

    @recipe(SLUG, kind="solver", claim="c", baseline="b", citation="")
    def made(seed: int) -> Findings:
        return Findings(
            [Check("weight", float(torch.nn.Linear(3, 3).weight.detach().sum()), None, "ours < 9")], 1, "d", "m", ""
        )

    torch.manual_seed(1)
    first = made.run(seed=5).checks[0].ours
    torch.manual_seed(1)
    torch.rand(7)
    again = made.run(seed=5).checks[0].ours
    assert first == again != made.run(seed=6).checks[0].ours
    after = torch.rand(2)
    torch.manual_seed(1)
    torch.rand(7)
    assert torch.equal(after, torch.rand(2))
