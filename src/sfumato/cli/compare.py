"""``sfumato compare``: which sampler for this model, at which number of calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli._app import Answer, command, scale_or_spec
from sfumato.cli._options import Guidance, Model

FEATURES, METRIC = "efficientnet-lite0", "frechet"

Solvers = Annotated[
    list[str] | None, typer.Option("--solver", help="A solver or spec; may be repeated. Default: the common ones.")
]
Grids = Annotated[
    list[str] | None, typer.Option("--grid", help="Where the steps lie; may be repeated. Default: each solver's own.")
]
Calls = Annotated[
    list[int] | None,
    typer.Option(
        "--nfe",
        help="Calls of the model an image, guided or not. May be repeated. Default: 5 8 10 15 20.",
    ),
]
Samplers = Annotated[
    list[Path] | None, typer.Option("--sampler", help="A card that `sfumato tune` wrote; may be repeated.")
]
Accelerations = Annotated[
    list[str] | None,
    typer.Option("--accelerate", help="The same again with e.g. 'deepcache(interval=3)'; may be repeated."),
]
Also = Annotated[
    list[str] | None,
    typer.Option("--also", help="A further model from the same starts, a student say; may be repeated."),
]
Reference = Annotated[
    str | None, typer.Option(help="Rank by quality against a folder, shards or a data set such as emoji:train.")
]
Features = Annotated[str, typer.Option(help="Of that quality: efficientnet-lite0, mobilenet-v2, emoji-judge, pixels.")]
Metric = Annotated[str, typer.Option(help="Of that quality: frechet, kernel, text-agreement, ...")]
Number = Annotated[int, typer.Option("-n", min=8, help="Start noises.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="Prompts, in turn; may be repeated.")]
Fine = Annotated[int, typer.Option(min=2, help="Calls of the fine solution.")]
Seed = Annotated[int, typer.Option(help="The starts depend on it.")]
Out = Annotated[Path | None, typer.Option(help="A picture, NAME.png; the table goes beside it as JSON.")]


@command("compare")
def compare(
    model: Model,
    solver: Solvers = None,
    grid: Grids = None,
    nfe: Calls = None,
    sampler: Samplers = None,
    accelerate: Accelerations = None,
    also: Also = None,
    reference: Reference = None,
    features: Features = FEATURES,
    metric: Metric = METRIC,
    n: Number = 32,
    prompts: Prompts = None,
    guidance: Guidance = None,
    fine: Fine = 100,
    seed: Seed = 0,
    out: Out = None,
) -> Answer:
    """Measure solvers, grids and sampler cards on one model, e.g. `sfumato compare digits --nfe 5 --nfe 10 --out digits.png`.

    The error of a run is its distance from where a fine solution takes the same noise. With --reference rows are ranked by
    what their pictures are worth instead, which students and accelerated models can be compared by:
    `sfumato compare emoji-latent --also emoji-latent-4 --accelerate deepcache --reference emoji:train --features emoji-judge`.
    """
    import sfumato
    from sfumato.cli._pictures import png
    from sfumato.core.errors import InputError
    from sfumato.evaluation import compare as verb

    if out is not None:
        png(out)
    if reference is None and (features, metric) != (FEATURES, METRIC):
        raise InputError("--features and --metric say how pictures are judged against --reference: give that too")
    pipeline = sfumato.load(model)
    quality = None
    if reference is not None:
        quality, prompts = _quality(pipeline, reference, features, metric, n, prompts)
    table = sfumato.compare(
        pipeline,
        solvers=tuple(solver) if solver else verb.SOLVERS,
        grids=tuple(grid) if grid else (None,),
        nfe=tuple(nfe) if nfe else verb.BUDGETS,
        samplers=tuple(sampler or ()),
        accelerations=tuple(accelerate or ()),
        models={name: sfumato.load(name) for name in also or ()},
        quality=quality,
        n=n,
        prompts=prompts,
        guidance=scale_or_spec(guidance),
        fine=fine,
        seed=seed,
    )
    record: dict[str, Any] = {"model": model, "title": table.title, "rows": list(table)}
    if out is not None:
        _kept(table, out)
        record["out"] = str(out)
    return Answer(record, _shown(table, out))


def _kept(table: Any, out: Path) -> None:
    """The picture of the table as NAME.png, and its rows as NAME.json."""
    import io

    from sfumato.evaluation.compare import picture
    from sfumato.files import write_atomically

    buffer = io.BytesIO()
    picture(table).save(buffer, "PNG", optimize=True)
    write_atomically(out, buffer.getvalue())
    write_atomically(out.with_suffix(".json"), (table.json() + "\n").encode())


def _quality(
    pipeline: Any, reference: str, features: str, metric: str, n: int, prompts: list[str] | None
) -> tuple[Callable[[Any], Any], list[str] | None]:
    """(images -> the figure, prompts): a model that reads words is told the captions of the reference unless told others."""
    import sfumato.zoo.encoders  # noqa: F401  its encoders are feature extractors
    from sfumato import evaluation
    from sfumato.cli.data import pictures
    from sfumato.cli.evaluate import coloured
    from sfumato.conditioners import Text
    from sfumato.core.errors import InputError

    wanted = pictures(reference, pipeline.size[0]).some(n)
    if prompts is None and isinstance(pipeline.conditioner, Text) and "caption" in wanted:
        prompts = [wanted["caption"][i % len(wanted["caption"])] for i in range(n)]
    asked = [prompts[i % len(prompts)] for i in range(n)] if prompts else None
    told = asked if metric == "text-agreement" else None
    if metric == "text-agreement" and told is None:
        raise InputError(
            "text-agreement compares pictures with words: give --prompt, or a model and a reference of words"
        )

    def quality(images: Any) -> Any:
        table = evaluation.evaluate(
            coloured(images),
            coloured(wanted["x"]),
            features=features,
            metrics=[metric],
            reference_name=reference,
            prompts=told,
        )
        return evaluation.Measurement.from_row(table.rows[0])

    if told is None:
        try:
            quality(wanted["x"])  # before anything is drawn: too few pictures for this metric, an unknown name
        except InputError as error:
            raise InputError(f"{error} (-n {n} pictures of each side here)") from error

    return quality, prompts


def _shown(table: Any, out: Path | None) -> Any:
    from rich import box
    from rich.console import Group
    from rich.table import Table

    judged = next((row["quality"]["name"] for row in table if "quality" in row), None)
    head = ["calls", "rows", "solver", "grid", "median error", "95 %", "distance", "ms an image", "front"]
    made = Table(*head, *([judged] if judged else []), box=box.SIMPLE_HEAD, pad_edge=False)
    notes = []
    for row in table:
        if "refused" in row:
            where = f" on {row['grid']}" if row["grid"] else ""
            notes.append(f"{row['solver']}{where}, {row['calls']} calls: {row['refused']}")
            continue
        error = row.get("error")
        figures = (
            (f"{error['value']:.4f}", f"{error['low']:.4f} to {error['high']:.4f}") if error else ("", "stochastic")
        )
        rest = f"{row['distance']:.4f}", f"{1000 * row['seconds']:.0f}", row["front"]
        worth = (f"{row['quality']['value']:.4f}",) if judged else ()
        made.add_row(f"{row['calls']:g}", f"{row['rows']:g}", row["solver"], row["grid"], *figures, *rest, *worth)
    parts: list[Any] = [
        made,
        f"{table.title}; rows: what the network evaluates for the calls (guidance: two each); front: nothing else is at least as good and as cheap.",
        *notes,
    ]
    return Group(*parts, f"Picture: {out}" if out else "--out NAME.png draws it.")
