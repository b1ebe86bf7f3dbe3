"""``sfumato evaluate``: a model, or a folder of pictures, against a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli._app import Answer, command, progress, scale_or_spec
from sfumato.cli._options import Guidance

if TYPE_CHECKING:
    from torch import Tensor

METRICS = "frechet,kernel,precision-recall,density-coverage"


@command("evaluate")
def evaluate(
    samples: Annotated[
        str, typer.Argument(metavar="MODEL|FOLDER", help="A model to sample from, a folder of pictures, or shards.")
    ],
    reference: Annotated[str, typer.Option(help="A folder, shards, or a data set such as emoji:unseen.")],
    number: Annotated[int, typer.Option("-n", "--number", min=2, help="Pictures of each side, at most.")] = 1000,
    features: Annotated[
        str, typer.Option(help="What pictures are compared by: efficientnet-lite0, mobilenet-v2, emoji-judge, pixels.")
    ] = "efficientnet-lite0",
    metrics: Annotated[str, typer.Option(help="Names, separated by commas.")] = METRICS,
    training: Annotated[
        str | None, typer.Option(help="What the model was trained on, for the metric 'memorisation'.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of the pictures. Default: the model's, else 64.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    solver: Annotated[str | None, typer.Option()] = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Keep the table: .json, .csv or .md.")] = None,
) -> Answer:
    """Figures with intervals: how far samples lie from a reference that the model has not seen."""
    import sfumato.zoo.encoders  # noqa: F401  its encoders are feature extractors
    from sfumato import evaluation
    from sfumato.cli.data import pictures
    from sfumato.pipeline import find

    try:
        model = find(samples)
    except FileNotFoundError:
        if not Path(samples).is_dir():
            raise
        model = None
    if model is None:
        side = size or 64
        wanted, prompted = pictures(reference, side).some(number), False
        given = pictures(samples, side).some(number)["x"]
    else:
        side, wanted, given, prompted = _drawn(
            samples, reference, size, number, steps, solver, scale_or_spec(guidance), seed
        )
    known = None if training is None else coloured(pictures(training, side).some(None)["x"])
    table = evaluation.evaluate(
        coloured(given),
        coloured(wanted["x"]),
        features=features,
        metrics=[name.strip() for name in metrics.split(",")],
        training=known,
        seed=seed,
        reference_name=reference,
        title=f"{samples} against {reference}",
    )
    if out is not None:
        table.save(out)
    record = {"samples": samples, "reference": reference, "size": side, "prompts_of_reference": prompted, "seed": seed}
    counts = {"n_samples": len(given), "n_reference": len(wanted["x"])}
    return Answer({**record, **counts, "rows": list(table.rows)}, table.markdown())


def coloured(images: Tensor) -> Tensor:
    """uint8 (N, 1 or 3, H, W) with three channels: grey pictures as red = green = blue, which every extractor reads."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _drawn(
    samples: str,
    reference: str,
    size: int | None,
    number: int,
    steps: int | None,
    solver: str | None,
    guidance: float | str | None,
    seed: int,
) -> tuple[int, dict[str, Any], Any, bool]:
    """(side, reference, samples, prompted): a model that reads words is given the captions of the reference."""
    import sfumato
    from sfumato.cli.data import pictures
    from sfumato.conditioners import Text
    from sfumato.core.errors import InputError

    pipeline = sfumato.load(samples)
    if size not in (None, pipeline.size[0]):
        raise InputError(f"{samples} makes pictures of {pipeline.size[0]} pixels: leave --size out")
    wanted = pictures(reference, pipeline.size[0]).some(number)
    prompted = isinstance(pipeline.conditioner, Text) and "caption" in wanted
    what = [wanted["caption"][i % len(wanted["caption"])] for i in range(number)] if prompted else number
    with progress("sampling") as told:
        given = pipeline.generate(what, steps=steps, solver=solver, guidance=guidance, seed=seed, progress=told)
    return pipeline.size[0], wanted, given, prompted
