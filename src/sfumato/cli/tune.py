"""``sfumato tune``: the best sampler of a few calls for a model, kept in a card."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli._app import Answer, command, scale_or_spec
from sfumato.cli._options import Guidance, Model

COLUMNS = ("method", "sampler", "calls", "score", "median error", "rms error", "")


@command("tune")
def tune(
    model: Model,
    nfe: Annotated[int, typer.Option(min=1, help="Calls of the model an image, guided or not.")] = 8,
    method: Annotated[
        str, typer.Option(help="auto, untuned, dpm-solver-v3, usf, olss, subspace or autodiffusion.")
    ] = "auto",
    guidance: Guidance = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="What to tune for; may be repeated. Default: all the model knows."),
    ] = None,
    items: Annotated[int, typer.Option(min=2, help="Starts to fit on, and as many to choose on.")] = 24,
    unseen: Annotated[int, typer.Option(min=2, help="Further starts for the figures that are reported.")] = 64,
    budget: Annotated[int, typer.Option(min=1, help="True evaluations of each search.")] = 60,
    fine: Annotated[int, typer.Option(min=2, help="Calls of the fine solution that is aimed at.")] = 64,
    by: Annotated[
        str,
        typer.Option(help="Choose by 'trajectory' (nearness to the fine solution) or 'distance' (of distributions)."),
    ] = "trajectory",
    seed: Annotated[int, typer.Option(help="Noise and searches depend on it.")] = 0,
    out: Annotated[Path | None, typer.Option(help="NAME.json. Default: MODEL-NFE.json.")] = None,
) -> Answer:
    """Search the sampler of --nfe calls that stays nearest to the model's fine solution, e.g. `sfumato tune digits --nfe 8`.

    Use it with `sfumato sample --sampler CARD.json`. The figures are of noise that was used neither to fit nor to choose.
    """
    import sfumato
    from sfumato.cli._places import file
    from sfumato.core.errors import InputError

    path = file(out or f"{Path(model).name}-{nfe}.json", ".json", what="a sampler card is a .json file")
    if by not in ("trajectory", "distance"):
        raise InputError(f"--by {by}: 'trajectory' or 'distance'")
    pipeline = sfumato.load(model)
    with _live() as told:
        card = sfumato.tune(
            pipeline, nfe, method, prompts=prompts or None, guidance=scale_or_spec(guidance), items=items, unseen=unseen, fine=fine,
            budget=budget, by=_distance if by == "distance" else None, seed=seed, model=model, told=told,
        )  # fmt: skip
    card.save(path)
    record = card.record() | {"out": str(path)}
    record["gain"] = card.before["median"] / card.after["median"] if card.after["median"] else None
    return Answer(record, _summary(card, path))


def _distance(ends: Any, fine: Any) -> float:
    """Sliced Wasserstein distance of the ends of a sampler to those of the fine solution."""
    from sfumato.evaluation.metrics import sliced_wasserstein

    return float(sliced_wasserstein(ends.flatten(1), fine.flatten(1), groups=min(10, max(2, len(ends) // 2))).value)


def _summary(card: Any, path: Path) -> Any:
    from rich.console import Group

    n, before, after = card.after["n"], card.before, card.after
    said = (
        f"{path}: {card.made_by}, {card.nfe} calls. Median error {after['median']:.4f} "
        f"({after['interval'][0]:.4f} to {after['interval'][1]:.4f}) on {n} unseen starts; {before['sampler']}: "
        f"{before['median']:.4f}. Tuned in {card.seconds:.0f} s."
    )
    return Group(_table([dict(r) for r in card.rows]), said)


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    made = Table(*COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        score = row.get("score", row.get("choosing"))
        figures = [f"{row[k]:.4f}" if k in row else "" for k in ("median", "rms")]
        mark = "chosen" if row.get("chosen") else ""
        made.add_row(row["method"], row["sampler"], str(row.get("nfe", "")), f"{score:.4f}", *figures, mark)
    return made


@contextlib.contextmanager
def _live() -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """A table on a terminal's stderr that follows the search, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console, Group
    from rich.live import Live

    with Live(console=Console(stderr=True), transient=True, refresh_per_second=4) as live:

        def told(news: Mapping[str, Any]) -> None:
            best = "" if news["best"] is None else f", best {news['best']:.4f}"
            stage = f"{news['stage']}: {news['done']} of {news['total']}{best}"
            live.update(Group(_table(sorted(news["rows"], key=lambda r: r.get("choosing", 0.0))[:12]), stage))

        yield told
