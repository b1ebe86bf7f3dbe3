"""``sf.compare``: samplers of one model against its fine solution: quality against calls and against seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato import grids as grids_
from sfumato import solvers as solvers_
from sfumato.core import Denoiser, InputError, Solver, mix
from sfumato.evaluation.measurement import Measurement
from sfumato.evaluation.metrics import sliced_wasserstein
from sfumato.evaluation.table import Table
from sfumato.tuning.card import SamplerCard
from sfumato.tuning.target import Target, aim
from sfumato.tuning.tune import median_interval

SOLVERS = ("ddim", "dpm-solver++", "unipc", "deis", "arc")
BUDGETS = (5, 8, 10, 15, 20)


def compare(
    pipeline: Any,
    *,
    solvers: Sequence[str] = SOLVERS,
    grids: Sequence[str | None] = (None,),
    nfe: Sequence[int] = BUDGETS,
    samplers: Sequence[str | Path | SamplerCard] = (),
    n: int = 32,
    shape: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    cond: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    fine: int = 100,
    batch: int = 16,
    seed: int = 0,
    told: Callable[[int, int], None] | None = None,
) -> Table:
    """One row a sampler and budget, best first within a budget.

    pipeline  a Pipeline, or a Denoiser with ``shape`` = (*), the event's shape
    solvers   specs; grids too, None being the one a solver needs, or arctan
    nfe       network calls an image; a solver of k calls a step takes nfe // k steps
    samplers  sampler cards, each a row at its own number of calls
    n         starts, item i from stream (mix(seed, 0), i): noise that no tuning has used unless it was given that seed
    fine      calls of the fine solution

    Columns: solver, grid, calls (counted, an image), error (median over items of the root mean square distance from where
    the fine solution takes the same start, with its 95 % interval; None for stochastic solvers), rms (over all items: a few
    items on the boundary between two results dominate it), distance (sliced Wasserstein to the fine ends of the same
    starts), seconds (an image, in batches of ``batch``), front ('calls', 'seconds', 'both' or '': no other sampler is at
    least as good in both). A combination that its solver refuses is a row with ``refused`` and no figures.
    """
    if n < 8 or fine < 2 or not nfe or min(nfe) < 1:
        raise InputError(
            f"n = {n} (at least 8), fine = {fine} (at least 2), nfe = {list(nfe)} (positive, at least one)"
        )
    denoiser, event, given = _opened(pipeline, shape, prompts, cond, guidance, n)
    target = aim(denoiser, (n, *event), seed=mix(seed, 0), cond=given, steps=fine, batch=batch)
    plans: list[tuple[float, str, str | None, SamplerCard | None]] = [
        (calls, s, g, None) for calls in nfe for s in solvers for g in grids
    ]
    cards = [c if isinstance(c, SamplerCard) else SamplerCard.load(c) for c in samplers]
    plans += [(card.nfe, f"card: {card.made_by}", None, card) for card in cards]
    rows = []
    for i, (calls, spec, grid, card) in enumerate(plans):
        rows.append(_row(target, calls, spec, grid, card, pipeline))
        if told is not None:
            told(i + 1, len(plans))
    fronts = _fronts(rows)
    ordered = sorted(({**row, "front": front} for row, front in zip(rows, fronts, strict=True)), key=_order)
    return Table(ordered, title=f"{n} starts, fine solution of {fine} calls")


def _opened(
    pipeline: Any, shape: Any, prompts: Any, cond: Any, guidance: float | None, n: int
) -> tuple[Denoiser, Sequence[int], dict[str, Any]]:
    if isinstance(pipeline, Denoiser):
        if shape is None or guidance is not None or prompts is not None:
            raise InputError("a Denoiser is compared with shape=, cond= tensors and its guidance already around it")
        return pipeline.eval(), shape, dict(cond or {})
    texts = [prompts[i % len(prompts)] for i in range(n)] if prompts else None
    pipeline.denoiser.eval()
    given = pipeline.conditions(n, texts, **(cond or {}))
    return pipeline.guided(guidance), pipeline.codec.shape(*pipeline.size), given


def _row(
    target: Target, calls: float, spec: str, grid: str | None, card: SamplerCard | None, pipeline: Any
) -> dict[str, Any]:
    row: dict[str, Any] = {"solver": spec, "grid": grid or "", "calls": calls}
    try:
        if card is None:
            solver, made = _made(spec, calls)
            row["grid"] = grid or solver.grid or "arctan"
            chosen, steps, denoiser = grids_.registry.make(row["grid"]), made, None
        else:
            card.check(getattr(pipeline, "denoiser", pipeline))
            solver, chosen, steps, denoiser = card.solver(), card.grid(), card.steps, card.prepared(target.denoiser)
        times = chosen(target.process, steps, target.times[0], target.times[-1]).tolist()
        before, began = target.counted["nfe"], time.perf_counter()
        ends = target.run(solver, times, denoiser)
        seconds = time.perf_counter() - began
    except InputError as error:
        return {**row, "refused": str(error)}
    row["calls"] = round((target.counted["nfe"] - before) / len(target.x), 2)
    errors = target.distance(ends)
    if not solver.stochastic:
        row |= {"error": _median(errors), "rms": float(errors.clamp(max=1e6).square().mean().sqrt())}
    distance = 1e6
    if bool(ends.isfinite().all()):
        distance = sliced_wasserstein(ends.flatten(1), target.ends.flatten(1), groups=min(10, len(ends) // 2)).value
    return row | {"distance": distance, "seconds": seconds / len(target.x)}


def _made(spec: str, calls: float) -> tuple[Solver, int]:
    """The solver and how many steps it takes within the budget."""
    solver = solvers_.registry.make(spec)
    return solver, 1 if math.isnan(solver.nfe) else max(1, math.floor(calls / solver.nfe))


def _median(errors: Tensor) -> Measurement:
    low, high = median_interval(errors)
    middle = float(errors.clamp(max=1e6).median())
    return Measurement(
        "error", middle, low, high, len(errors), interval="95 % by order statistics",
        higher_is_better=False, reference="the fine solution from the same starts",
    )  # fmt: skip


def _fronts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each row whether nothing is at least as good and as cheap, in calls, in seconds, in both."""

    def kept(row: Mapping[str, Any], cost: str) -> bool:
        rivals = [r for r in rows if "error" in r and r is not row]
        mine = (row[cost], row["error"].value)
        return not any(
            (r[cost], r["error"].value) <= mine and r[cost] <= mine[0] and r["error"].value <= mine[1] for r in rivals
        )

    out = []
    for row in rows:
        by = [cost for cost in ("calls", "seconds") if "error" in row and kept(row, cost)]
        out.append("both" if len(by) == 2 else "".join(by))
    return out


def _order(row: Mapping[str, Any]) -> tuple[float, float]:
    return float(row["calls"]), row["error"].value if "error" in row else math.inf


def picture(table: Table) -> Any:
    """Error against calls and against seconds, a line a sampler, the Pareto front marked: a PIL image."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    made = Figure(figsize=(11, 4.6), facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys((row["solver"], row["grid"]) for row in table if "error" in row))
    colors = [
        "#2e86ab",
        "#d1495b",
        "#edae49",
        "#00798c",
        "#8d5a97",
        "#66a182",
        "#22303c",
        "#b5651d",
        "#7a7a7a",
        "#e07a5f",
    ]
    for i, (solver, grid) in enumerate(names):
        rows = [row for row in table if "error" in row and (row["solver"], row["grid"]) == (solver, grid)]
        label = solver if grid in ("", "arctan") else f"{solver}, {grid}"
        for ax, cost in zip(axes, ("calls", "seconds"), strict=True):
            points = sorted(
                (row[cost], row["error"]["value"], row["error"]["low"], row["error"]["high"]) for row in rows
            )
            x, y, low, high = zip(*points, strict=True)
            color = colors[i % len(colors)]
            ax.plot(x, y, color=color, lw=1.6, marker="o", ms=4, label=label)
            ax.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
    for ax, cost in zip(axes, ("calls", "seconds"), strict=True):
        front = sorted((row[cost], row["error"]["value"]) for row in table if row["front"] in (cost, "both"))
        if front:
            ax.scatter(
                *zip(*front, strict=True),
                s=90,
                facecolors="none",
                edgecolors="#22303c",
                lw=1.2,
                zorder=5,
                label="front",
            )
        ax.set(yscale="log", xlabel="network calls an image" if cost == "calls" else "seconds an image")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#d5dbe0", lw=0.5)
    axes[0].set_ylabel("median distance to the fine solution")
    made.suptitle(table.title, fontsize=10)
    axes[1].legend(frameon=False, fontsize=8, bbox_to_anchor=(1.01, 1.0), loc="upper left")
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer).convert("RGB")
