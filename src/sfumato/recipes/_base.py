"""What a recipe is, and the evidence that running it gives."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.core import mix
from sfumato.core.errors import InputError, UnknownName
from sfumato.recipes._rules import holds

KINDS = (
    "process", "network", "denoiser", "solver", "guidance", "steering", "operator", "codec", "objective", "acceleration",
    "tuning", "editing", "domain", "pipeline", "study",
)  # fmt: skip
FIELDS = ("slug", "claim", "baseline", "checks", "holds", "seed", "seconds", "nfe", "data", "model", "notes")


@dataclass(frozen=True)
class Check:
    """One figure of ours against a rule that was written before the run: ``Check("Fréchet", 3.1, 4.0, "ours <= 0.9 * baseline")``.

    ``baseline`` is the same figure of the baseline, or None where the rule has a number instead. Raises InputError for a
    rule that cannot be read, or that cannot fail. ``holds`` is computed from the figures, never given.
    """

    name: str
    ours: float
    baseline: float | None
    rule: str
    holds: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ours", float(self.ours))
        object.__setattr__(self, "baseline", None if self.baseline is None else float(self.baseline))
        object.__setattr__(self, "holds", holds(self.rule, self.ours, self.baseline))

    def record(self) -> dict[str, Any]:
        """The check as JSON values; figures that are not finite as text."""
        figures = {"ours": _figure(self.ours), "baseline": _figure(self.baseline)}
        return {"name": self.name, **figures, "rule": self.rule, "holds": self.holds}


@dataclass(frozen=True)
class Findings:
    """What the body of a recipe returns.

    nfe      denoiser calls an image, a number or one a method
    data     which data, how many items, which are unseen
    model    which network or bundled pipeline
    notes    what a reader must know: intervals, and where the check fails the likely reason
    picture  a PIL image, kept beside the figures
    """

    checks: Sequence[Check]
    nfe: float | Mapping[str, float]
    data: str
    model: str
    notes: str = ""
    picture: Any = None


@dataclass(frozen=True)
class Evidence:
    """The outcome of one run of a recipe. The claim holds when every check does."""

    slug: str
    claim: str
    baseline: str
    checks: tuple[Check, ...]
    seed: int
    seconds: float
    nfe: float | Mapping[str, float]
    data: str
    model: str
    notes: str = ""
    picture: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.checks:
            raise InputError(f"{self.slug} has no check: evidence is at least one")

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)

    @property
    def tally(self) -> str:
        """How many of the checks hold, "11 of 12"."""
        return f"{sum(check.holds for check in self.checks)} of {len(self.checks)}"

    def record(self) -> dict[str, Any]:
        """JSON values under the names of the evidence format, in its order."""
        values = {name: getattr(self, name) for name in FIELDS}
        nfe = dict(self.nfe) if isinstance(self.nfe, Mapping) else self.nfe
        return {**values, "checks": [check.record() for check in self.checks], "nfe": nfe}

    def json(self) -> str:
        """The record as strict JSON."""
        return json.dumps(self.record(), indent=1, ensure_ascii=False, allow_nan=False)

    def save(self, folder: str | Path) -> Path:
        """Write ``SLUG.json``, and ``SLUG.png`` where there is a picture, whole or not at all; return the first."""
        from sfumato.files import write_atomically

        path = Path(folder) / f"{self.slug}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.picture is not None:
            write_atomically(path.with_suffix(".png"), _png(self.picture))
        write_atomically(path, (self.json() + "\n").encode())
        return path

    @staticmethod
    def of(text: str) -> Evidence:
        """Read what :meth:`json` wrote. Raises InputError for anything else, or where a verdict is not its rule's."""
        try:
            record = json.loads(text)
            checks = tuple(_check(entry) for entry in record["checks"])
            values = {name: record[name] for name in FIELDS if name not in ("checks", "holds")}
            found = Evidence(**values, checks=checks)
            stated = [entry["holds"] for entry in record["checks"]], record["holds"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"this is no evidence of a recipe ({type(error).__name__}: {error}): run reproduce again"
            ) from error
        if stated != ([check.holds for check in checks], found.holds):
            raise InputError(
                f"the evidence of {found.slug} states another verdict than its figures give: run reproduce again"
            )
        return found


@dataclass(frozen=True)
class Paper:
    """A published system: the slug names its recipe, its command and its evidence."""

    slug: str
    title: str
    family: str


@dataclass(frozen=True)
class Recipe:
    """One published system: how to build it from parts, its claim, its baseline and the checks.

    kind      what it is here, one of ``KINDS``
    claim     what the publication says and the checks test, in one sentence with its numbers
    baseline  what runs beside it on the same data, network and budget
    citation  BibTeX
    measure   seed -> Findings: runs method and baseline
    """

    slug: str
    title: str
    family: str
    kind: str
    claim: str
    baseline: str
    citation: str
    measure: Callable[[int], Findings]

    def run(self, seed: int = 0, out: str | Path | None = None) -> Evidence:
        """Run method and baseline with this seed; ``out`` is a folder to keep the evidence in.

        Networks that a recipe makes begin with weights of this seed: torch's own generator is seeded for the run only.
        """
        import torch

        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(seed) % 2**32)
            found = self.measure(seed)
        evidence = Evidence(
            self.slug,
            self.claim,
            self.baseline,
            tuple(found.checks),
            seed,
            round(time.perf_counter() - began, 1),
            found.nfe,
            found.data,
            found.model,
            found.notes,
            found.picture,
        )
        if out is not None:
            evidence.save(out)
        return evidence


_made: dict[str, Recipe] = {}


def recipe(
    slug: str, *, kind: str, claim: str, baseline: str, citation: str
) -> Callable[[Callable[[int], Findings]], Recipe]:
    """Make the decorated ``seed -> Findings`` the recipe of a published system, whose title and family are known by slug.

    Raises InputError for another kind than those of ``KINDS``, UnknownName for a slug that is no published system.
    """
    if kind not in KINDS:
        raise InputError(f"kind = {kind!r}: use one of {', '.join(KINDS)}")
    paper = about(slug)

    def decorate(measure: Callable[[int], Findings]) -> Recipe:
        _made[slug] = Recipe(slug, paper.title, paper.family, kind, claim, baseline, citation, measure)
        return _made[slug]

    return decorate


def papers() -> tuple[Paper, ...]:
    """All published systems, by family."""
    listed = json.loads((Path(__file__).parent / "papers.json").read_text(encoding="utf-8"))
    return tuple(Paper(**entry) for entry in listed["papers"])


def about(slug: str) -> Paper:
    """The published system of that slug. UnknownName where there is none."""
    import difflib

    found = {paper.slug: paper for paper in papers()}
    if slug not in found:
        near = difflib.get_close_matches(slug, found, 3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UnknownName(f"no published system has the slug {slug!r}{hint}; `sfumato papers` lists all {len(found)}")
    return found[slug]


def _check(entry: Mapping[str, Any]) -> Check:
    baseline = entry["baseline"]
    return Check(entry["name"], float(entry["ours"]), None if baseline is None else float(baseline), entry["rule"])


def _figure(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _png(picture: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
