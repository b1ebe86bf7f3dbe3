"""``sfumato compare``: which sampler for this model, at which number of calls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli._app import Answer, command


@command("compare")
def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A bundled name, or a folder that a training wrote.")],
    solver: Annotated[
        list[str] | None, typer.Option("--solver", help="A solver or spec; may be repeated. Default: the common ones.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", help="Where the steps lie; may be repeated. Default: each solver's own."),
    ] = None,
    nfe: Annotated[
        list[int] | None, typer.Option("--nfe", help="Network calls; may be repeated. Default: 5 8 10 15 20.")
    ] = None,
    sampler: Annotated[
        list[Path] | None, typer.Option("--sampler", help="A card that `sfumato tune` wrote; may be repeated.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=8, help="Start noises.")] = 32,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="Prompts, in turn; may be repeated.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free scale. Default: the model's.")] = None,
    fine: Annotated[int, typer.Option(min=2, help="Calls of the fine solution.")] = 100,
    seed: Annotated[int, typer.Option(help="The starts depend on it.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A picture, NAME.png; the table goes beside it as JSON.")] = None,
) -> Answer:
    """Measure solvers, grids and sampler cards on one model, e.g. `sfumato compare digits --nfe 5 --nfe 10 --out digits.png`.

    The error of a run is its distance from where a fine solution takes the same noise.
    """
    import sfumato
    from sfumato.core.errors import InputError
    from sfumato.evaluation import compare as verb
    from sfumato.files import write_atomically

    if out is not None and out.suffix != ".png":
        raise InputError(f"{out}: the picture is a .png file")
    table = sfumato.compare(
        sfumato.load(model),
        solvers=tuple(solver) if solver else verb.SOLVERS,
        grids=tuple(grid) if grid else (None,),
        nfe=tuple(nfe) if nfe else verb.BUDGETS,
        samplers=tuple(sampler or ()),
        n=n,
        prompts=prompts,
        guidance=guidance,
        fine=fine,
        seed=seed,
    )
    record: dict[str, Any] = {"model": model, "title": table.title, "rows": list(table)}
    if out is not None:
        import io

        buffer = io.BytesIO()
        verb.picture(table).save(buffer, "PNG", optimize=True)
        write_atomically(out, buffer.getvalue())
        write_atomically(out.with_suffix(".json"), (table.json() + "\n").encode())
        record["out"] = str(out)
    return Answer(record, _shown(table, out))


def _shown(table: Any, out: Path | None) -> Any:
    from rich import box
    from rich.console import Group
    from rich.table import Table

    made = Table("calls", "solver", "grid", "median error", "95 %", "distance", "ms an image", "front",
                 box=box.SIMPLE_HEAD, pad_edge=False)  # fmt: skip
    notes = []
    for row in table:
        if "refused" in row:
            notes.append(f"{row['solver']} on {row['grid']}, {row['calls']} calls: {row['refused']}")
            continue
        error = row.get("error")
        figures = (
            (f"{error['value']:.4f}", f"{error['low']:.4f} to {error['high']:.4f}") if error else ("", "stochastic")
        )
        rest = f"{row['distance']:.4f}", f"{1000 * row['seconds']:.0f}", row["front"]
        made.add_row(f"{row['calls']:g}", row["solver"], row["grid"], *figures, *rest)
    parts: list[Any] = [made, f"{table.title}; front: nothing else is at least as near and as cheap.", *notes]
    return Group(*parts, f"Picture: {out}" if out else "--out NAME.png draws it.")
