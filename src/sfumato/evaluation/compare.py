"""``sf.compare``: samplers of one model against its fine solution: quality against calls and against seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import acceleration
from sfumato import grids as grids_
from sfumato import solvers as solvers_
from sfumato.core import Denoiser, Grid, InputError, Solver, mix
from sfumato.evaluation.measurement import Measurement
from sfumato.evaluation.metrics import sliced_wasserstein
from sfumato.evaluation.table import Table
from sfumato.tuning.card import SamplerCard
from sfumato.tuning.target import Target, aim
from sfumato.tuning.tune import median_interval

SOLVERS = ("ddim", "dpm-solver++", "unipc", "deis", "arc")
BUDGETS = (5, 8, 10, 15, 20)
COLORS = (
    "#2e86ab", "#d1495b", "#edae49", "#00798c", "#8d5a97", "#66a182", "#22303c", "#b5651d", "#7a7a7a", "#e07a5f",
)  # fmt: skip
COSTS = {
    "calls": (1, "calls an image"),
    "seconds": (1000, "milliseconds an image"),
}  # unit and label in a picture
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Arm:
    """A row to be: what it is called, the calls it may make, and how to make (solver, grid, steps, denoiser), or refuse."""

    solver: str
    grid: str
    calls: float
    make: Callable[[], tuple[Solver, Grid, int, Denoiser | None]]


def compare(
    pipeline: Any,
    *,
    solvers: Sequence[str] = SOLVERS,
    grids: Sequence[str | None] = (None,),
    nfe: Sequence[int] = BUDGETS,
    samplers: Sequence[str | Path | SamplerCard] = (),
    accelerations: Sequence[str] = (),
    models: Mapping[str, Any] | None = None,
    quality: Callable[[Tensor], Measurement] | None = None,
    n: int = 32,
    shape: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    cond: Mapping[str, Any] | None = None,
    guidance: float | str | None = None,
    fine: int = 100,
    batch: int = 16,
    seed: int = 0,
    told: Callable[[int, int], None] | None = None,
) -> Table:
    """One row a sampler and budget, best first within a budget.

    pipeline  a Pipeline, or a Denoiser with ``shape`` = (*), the event's shape
    solvers   specs; grids too, None being the one a solver needs, or arctan
    nfe       calls of the model an image, guided or not, as ``sf.tune`` counts them; a solver of k calls a step takes
              nfe // k steps
    samplers  sampler cards, each a row at its own number of calls
    accelerations  specs such as "deepcache(interval=3)": every solver and budget again with each of them
    models    further Pipelines by name, students say: each as it is (its sampler, its guidance), from the same starts
    quality   uint8 images (n, 3, H, W) of a row -> a figure; None: rows are ranked by ``error``
    n         starts, item i from stream (mix(seed, 0), i): noise that no tuning has used unless it was given that seed
    guidance  a scale, or a spec such as "apg(scale=4)"; default: the pipeline's
    fine      calls of the fine solution

    Columns: solver, grid, calls (counted, an image), rows (what the network evaluated for them an image: two a call under
    classifier-free guidance), error (median over items of the root mean square distance from where
    the fine solution takes the same start, with its 95 % interval; None for stochastic solvers), rms (over all items: a few
    items on the boundary between two results dominate it), distance (sliced Wasserstein to the fine ends of the same
    starts), quality (where asked for), seconds (an image, in batches of ``batch``), front ('calls', 'seconds', 'both' or '':
    no other row is at least as good in both). A combination that is refused is a row with ``refused`` and no figures.
    """
    if n < 8 or fine < 2 or not nfe or min(nfe) < 1:
        raise InputError(
            f"n = {n} (at least 8), fine = {fine} (at least 2), nfe = {list(nfe)} (positive, at least one)"
        )
    if quality is not None and isinstance(pipeline, Denoiser):
        raise InputError("quality is of images: give a Pipeline, which knows how to make them")
    denoiser, event, given = _opened(pipeline, shape, prompts, cond, guidance, n)
    target = aim(denoiser, (n, *event), seed=mix(seed, 0), cond=given, steps=fine, batch=batch)
    wraps: dict[str, Denoiser] = {"": denoiser}
    for spec in accelerations:
        bare = isinstance(pipeline, Denoiser)
        made = acceleration.get(spec)(denoiser) if bare else pipeline.accelerated(spec).guided(guidance)
        wraps[f", {spec}"] = made
    arms = [
        _sampler(s, g, calls, name, wrapped)
        for name, wrapped in wraps.items() for calls in nfe for s in solvers for g in grids
    ]  # fmt: skip
    arms += [_card(c if isinstance(c, SamplerCard) else SamplerCard.load(c), target, pipeline) for c in samplers]
    arms += [_model(name, other, pipeline) for name, other in (models or {}).items()]
    rows = []
    for i, arm in enumerate(arms):
        rows.append(_row(target, arm, pipeline, quality))
        if told is not None:
            told(i + 1, len(arms))
    fronts = _fronts(rows)
    ordered = sorted(({**row, "front": front} for row, front in zip(rows, fronts, strict=True)), key=_order)
    return Table(ordered, title=f"{n} starts, fine solution of {fine} calls")


def _opened(
    pipeline: Any, shape: Any, prompts: Any, cond: Any, guidance: float | str | None, n: int
) -> tuple[Denoiser, Sequence[int], dict[str, Any]]:
    if isinstance(pipeline, Denoiser):
        if shape is None or guidance is not None or prompts is not None:
            raise InputError("a Denoiser is compared with shape=, cond= tensors and its guidance already around it")
        return pipeline.eval(), shape, dict(cond or {})
    texts = [prompts[i % len(prompts)] for i in range(n)] if prompts else None
    pipeline.denoiser.eval()
    given = pipeline.conditions(n, texts, **(cond or {}))
    return pipeline.guided(guidance), pipeline.codec.shape(*pipeline.size), given


def _sampler(spec: str, grid: str | None, calls: float, name: str, denoiser: Denoiser) -> Arm:
    """A registered solver within a number of calls, of the model or of an accelerated one."""

    def make() -> tuple[Solver, Grid, int, Denoiser | None]:
        solver = solvers_.registry.make(spec)
        chosen = grids_.registry.make(grid or solver.grid or "arctan")
        known = math.isfinite(solver.nfe)
        steps = solvers_.steps_within(solver, denoiser.process, chosen, calls) if known else 1
        return solver, chosen, steps, denoiser

    return Arm(spec + name, grid or solvers_.registry.make(spec).grid or "arctan", calls, make)


def _card(card: SamplerCard, target: Target, pipeline: Any) -> Arm:
    """A tuned sampler."""

    def make() -> tuple[Solver, Grid, int, Denoiser | None]:
        card.check(getattr(pipeline, "denoiser", pipeline))
        if card.begins is not None:
            raise InputError("this card begins from states of its own: no fine solution starts from the same noise")
        return card.solver(), card.grid(), card.steps, card.prepared(target.denoiser)

    return Arm(f"card: {card.made_by}", "", card.nfe, make)


def _model(name: str, other: Any, pipeline: Any) -> Arm:
    """Another model under its own sampler and guidance."""

    def make() -> tuple[Solver, Grid, int, Denoiser | None]:
        if isinstance(pipeline, Denoiser):
            raise InputError("models are compared with a Pipeline: they share its starts and conditions")
        mine, its = ((p.process, tuple(p.codec.shape(*p.size))) for p in (pipeline, other))
        if mine != its:
            raise InputError(f"its states are {its[1]} under {its[0]}, not {mine[1]} under {mine[0]}: no common starts")
        solver = solvers_.registry.make(other.solver) if isinstance(other.solver, str) else other.solver
        chosen = solver.grid or other.grid
        grid = grids_.registry.make(chosen) if isinstance(chosen, str) else chosen
        other.denoiser.eval()
        return solver, grid, other.steps, other.guided()

    return Arm(name, "", other.steps, make)


def _row(target: Target, arm: Arm, pipeline: Any, quality: Callable[[Tensor], Measurement] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"solver": arm.solver, "grid": arm.grid, "calls": arm.calls}
    try:
        solver, chosen, steps, denoiser = arm.make()
        times = chosen(target.process, steps, target.times[0], target.times[-1]).tolist()
        before, began = dict(target.counted), time.perf_counter()
        ends = target.run(solver, times, denoiser)
        seconds = time.perf_counter() - began
    except InputError as error:
        return {**row, "refused": str(error)}
    for column, counted in (("calls", "calls"), ("rows", "nfe")):
        row[column] = round((target.counted[counted] - before[counted]) / len(target.x), 2)
    errors = target.distance(ends)
    if not solver.stochastic:
        row |= {"error": _median(errors), "rms": float(errors.clamp(max=1e6).square().mean().sqrt())}
    distance = 1e6
    if bool(ends.isfinite().all()):
        distance = sliced_wasserstein(ends.flatten(1), target.ends.flatten(1), groups=min(10, len(ends) // 2)).value
    if quality is not None:
        row["quality"] = quality(images(pipeline, ends))
    return row | {"distance": distance, "seconds": seconds / len(target.x)}


@torch.no_grad()
def images(pipeline: Any, x: Tensor, batch: int = 32) -> Tensor:
    """uint8 pictures of states, in parts."""
    return torch.cat([pipeline.codec.images(part) for part in x.split(batch)])


def _median(errors: Tensor) -> Measurement:
    low, high = median_interval(errors)
    middle = float(errors.clamp(max=1e6).median())
    return Measurement(
        "error", middle, low, high, len(errors), interval="95 % by order statistics",
        higher_is_better=False, reference="the fine solution from the same starts",
    )  # fmt: skip


def ranked(rows: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """(the column that says how good a row is, whether more is better): 'quality' where it was measured, else 'error'."""
    judged = [row["quality"] for row in rows if "quality" in row]
    if not judged:
        return "error", False
    one = judged[0] if isinstance(judged[0], Mapping) else vars(judged[0])
    return "quality", bool(one["higher_is_better"])


def _fronts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each row whether nothing is at least as good and as cheap, in calls, in seconds, in both."""
    by, more = ranked(rows)

    def value(row: Mapping[str, Any]) -> float:
        return float(-row[by].value if more else row[by].value)

    def kept(row: Mapping[str, Any], cost: str) -> bool:
        rivals = [r for r in rows if by in r and r is not row]
        mine = (row[cost], value(row))
        return not any((r[cost], value(r)) <= mine and r[cost] <= mine[0] and value(r) <= mine[1] for r in rivals)

    out = []
    for row in rows:
        costs = [cost for cost in ("calls", "seconds") if by in row and kept(row, cost)]
        out.append("both" if len(costs) == 2 else "".join(costs))
    return out


def _order(row: Mapping[str, Any]) -> tuple[float, float]:
    return float(row["calls"]), row["error"].value if "error" in row else math.inf


def picture(table: Table) -> Any:
    """What ranks the rows against calls and against seconds, a line a sampler, the Pareto front marked: a PIL image."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    made = Figure(figsize=(11, 4.6), facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, 2, sharey=True)
    by, _ = ranked(list(table))
    known = [row for row in table if by in row]
    lines = list(dict.fromkeys((row["solver"], row["grid"]) for row in known))
    for i, (solver, grid) in enumerate(lines):
        rows = [row for row in known if (row["solver"], row["grid"]) == (solver, grid)]
        label = f"{solver}, {grid}" if sum(name == solver for name, _ in lines) > 1 else solver
        for ax, cost in zip(axes, COSTS, strict=True):
            _line(ax, rows, cost, by, i, label)
    for ax, cost in zip(axes, COSTS, strict=True):
        _finished(ax, known, cost, by)
    axes[0].set_ylabel("median distance to the fine solution" if by == "error" else known[0][by]["name"])
    made.suptitle(table.title, fontsize=10)
    axes[1].legend(frameon=False, fontsize=8, bbox_to_anchor=(1.01, 1.0), loc="upper left")
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer).convert("RGB")


def _line(ax: Any, rows: Sequence[Mapping[str, Any]], cost: str, by: str, i: int, label: str) -> None:
    """One sampler with its intervals: a band, or bars where they would cover each other."""
    color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
    unit, _ = COSTS[cost]
    points = sorted((unit * row[cost], row[by]["value"], row[by]["low"], row[by]["high"]) for row in rows)
    x, y, low, high = zip(*points, strict=True)
    ax.plot(x, y, color=color, lw=1.6, marker=marker, ms=5, label=label, zorder=3)
    if len(x) > 1 and by == "error":
        ax.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
    else:
        ax.vlines(x, low, high, color=color, lw=0.8, alpha=0.3)


def _finished(ax: Any, rows: Sequence[Mapping[str, Any]], cost: str, by: str) -> None:
    """The front, scales and labels of one side."""
    from matplotlib.ticker import FuncFormatter

    unit, label = COSTS[cost]
    front = sorted((unit * row[cost], row[by]["value"]) for row in rows if row["front"] in (cost, "both"))
    if front:
        x, y = zip(*front, strict=True)
        ax.scatter(x, y, s=110, facecolors="none", edgecolors="#22303c", lw=1.2, zorder=5, label="front")
    ax.set(xlabel=label)
    if by == "error":
        ax.set_yscale("log")
    if max(row[cost] for row in rows) > 20 * min(row[cost] for row in rows):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#d5dbe0", lw=0.5)
