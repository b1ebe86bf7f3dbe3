"""``sfumato evaluate``: a model, or a folder of pictures, against a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli._app import Answer, command, progress, scale_or_spec
from sfumato.cli._options import Guidance

if TYPE_CHECKING:
    from torch import Tensor

METRICS = "kernel,precision-recall,density-coverage"  # a Fréchet distance wants more pictures than there are features


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
    metrics: Annotated[
        str, typer.Option(help="Names, separated by commas; frechet needs more pictures than there are features.")
    ] = METRICS,
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
    from sfumato.cli._places import file
    from sfumato.cli.data import pictures
    from sfumato.evaluation.table import FORMATS

    if out is not None:
        file(out, *FORMATS, what="a table is kept as .json, .csv or .md")
    extractor, names = evaluation.features.get(features), [name.strip() for name in metrics.split(",")]
    pipeline = _model(samples)
    side = (size or 64) if pipeline is None else _side(pipeline, samples, size)
    wanted = pictures(reference, side).some(number)
    known = None if training is None else coloured(pictures(training, side).some(None)["x"])
    prompts = None if pipeline is None else _captions(pipeline, wanted, number)
    told = prompts if "text-agreement" in names else None
    options: dict[str, Any] = {
        "features": extractor,
        "metrics": names,
        "training": known,
        "seed": seed,
        "prompts": told,
    }
    if pipeline is None:
        given, beside = pictures(samples, side).some(number)["x"], coloured(wanted["x"])
    else:
        beside = _measurable(wanted["x"], options)
        how = {"steps": steps, "solver": solver, "guidance": scale_or_spec(guidance), "seed": seed}
        with progress("sampling") as moved:
            given = pipeline.generate(prompts or number, **how, progress=moved)
    table = evaluation.evaluate(
        coloured(given), beside, **options, reference_name=reference, title=f"{samples} against {reference}"
    )
    if out is not None:
        table.save(out)
    record = {"samples": samples, "reference": reference, "size": side, "prompts_of_reference": bool(prompts)}
    counts = {"seed": seed, "n_samples": len(given), "n_reference": len(wanted["x"])}
    return Answer({**record, **counts, "rows": list(table.rows)}, table.markdown())


def _model(samples: str) -> Any:
    """The model, or None for a folder of pictures."""
    import sfumato
    from sfumato.pipeline import find

    try:
        return sfumato.load(find(samples))
    except FileNotFoundError:
        if not Path(samples).is_dir():
            raise
        return None


def _side(pipeline: Any, samples: str, size: int | None) -> int:
    """That of the model's pictures, which nobody may ask to be another."""
    from sfumato.core.errors import InputError

    side: int = pipeline.size[0]
    if size not in (None, side):
        raise InputError(f"{samples} makes pictures of {side} pixels: leave --size out")
    return side


def _captions(pipeline: Any, wanted: dict[str, Any], number: int) -> list[str] | None:
    """Of the reference, in turn, for a model that reads words."""
    from sfumato.conditioners import Text

    if not isinstance(pipeline.conditioner, Text) or "caption" not in wanted:
        return None
    return [wanted["caption"][i % len(wanted["caption"])] for i in range(number)]


def _measurable(images: Tensor, options: dict[str, Any]) -> Tensor:
    """The features of the reference; what cannot be measured against so few pictures is refused before any is drawn."""
    from sfumato import evaluation
    from sfumato.core.errors import InputError
    from sfumato.evaluation.evaluate import find

    find(options["metrics"], options)
    features = evaluation.extract(coloured(images), options["features"], name="reference")
    names = [name for name in options["metrics"] if name != "text-agreement"]
    if names and len(features) <= features.shape[1]:
        try:
            evaluation.evaluate(features, features, **{**options, "metrics": names, "prompts": None})
        except InputError as error:
            said = f"{len(features)} pictures of the reference here; --metrics {METRICS} are content with fewer"
            raise InputError(f"{error} ({said})") from error
    return features


def coloured(images: Tensor) -> Tensor:
    """uint8 (N, 1 or 3, H, W) with three channels: grey pictures as red = green = blue, which every extractor reads."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
