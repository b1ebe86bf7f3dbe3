"""``sfumato distill``: a few-step student of a model, in a folder that goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli._app import Answer, command

FREE = ("iterations", "save_every", "log_every")  # what a resume may change


@command("distill")
def distill(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A bundled name, a folder that a training wrote, or one of a diffusers pipeline."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of trajectories, checkpoints and the pipeline.")] = Path("distilled"),
    method: Annotated[
        str,
        typer.Option(
            help="segments, progressive, rectified-diffusion, reflow, consistency, consistency-training, lcm-lora, slam or "
            "distribution-matching."
        ),
    ] = "segments",
    steps: Annotated[int, typer.Option(min=1, help="Network calls an image of the student.")] = 4,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the distillation in OUT, bit for bit.")] = False,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="What the student shall know; may be repeated. Default: all the model knows."),
    ] = None,
    scores: Annotated[
        bool, typer.Option("--scores", help="Measure the distance to the teacher's fine ends, for the card.")
    ] = False,
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE",
            help="iterations, batch, lr, ema, trajectories, calls, guidance, rank, halvings, seed; may be repeated.",
        ),
    ] = None,
) -> Answer:  # fmt: skip
    """Teach a student of a few calls, e.g. `sfumato distill digits --method segments --steps 4 --out fast`.

    The teacher makes its own data. OUT/pipeline is what `sfumato sample --model OUT` loads; guidance is in the student.
    """
    import time

    from sfumato import distillation
    from sfumato.cli._launch import on_cpu

    plan = _planned(out, model, method, steps, resume, prompts, list(given or ()))
    began = time.perf_counter()
    pipeline = _loaded(plan["model"])
    made = distillation.distill(
        pipeline,
        prompts=plan["prompts"],
        out=out,
        scores=scores,
        model=Path(plan["model"]).name,
        cpu=on_cpu(),
        **plan["settings"],
    )
    saved = out / "pipeline"
    if getattr(made, "source", None) is not None:
        made.source.save_pretrained(saved)  # type: ignore[attr-defined]
    record: dict[str, Any] = {"out": str(out), "pipeline": str(saved), **plan, "card": made.card}
    record["seconds"] = round(time.perf_counter() - began, 1)
    told = made.card.get("scores", {}).get("median distance to the teacher's end", {})
    shown = f"{made.card['what']}, in {record['seconds']:.0f} s\nsfumato sample --model {out}"
    return Answer(record, "\n".join([*(f"{name}: {value:.4f}" for name, value in told.items()), shown]))


def _loaded(model: str) -> Any:
    import sfumato

    if (Path(model) / "model_index.json").is_file():
        return sfumato.from_diffusers(model)
    return sfumato.load(model)


def _planned(
    out: Path, model: str | None, method: str, steps: int, resume: bool, prompts: list[str] | None, given: list[str]
) -> dict[str, Any]:
    """Model, prompts and settings: a resume takes those of the run, and may change only how long and how often."""
    from sfumato.core.errors import InputError
    from sfumato.distillation import Settings
    from sfumato.files import write_atomically

    file = out / "distill.json"
    if not resume and file.exists():
        raise InputError(f"{out} holds a distillation: --resume continues it, or choose another folder")
    if resume:
        if not file.is_file():
            raise InputError(f"there is no distillation in {out} to resume")
        kept = json.loads(file.read_text("utf-8"))
        settings = _settings(given, kept["settings"])
        before = dataclasses.asdict(Settings(**kept["settings"]))
        fixed = [k for k, v in dataclasses.asdict(settings).items() if v != before[k] and k not in FREE]
        fixed += ["model"] if model not in (None, kept["model"]) else []
        if fixed:
            raise InputError(f"{', '.join(fixed)} cannot change in a distillation that goes on; {', '.join(FREE)} can")
        plan = {**kept, "settings": dataclasses.asdict(settings)}
    else:
        if model is None:
            raise InputError("MODEL is missing: a bundled name, or a folder of a pipeline")
        plan = {
            "model": model, "prompts": prompts or None,
            "settings": dataclasses.asdict(_settings(given, {"method": method, "steps": steps})),
        }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(plan, indent=1).encode())
    return plan


def _settings(given: list[str], base: dict[str, Any]) -> Any:
    """Settings from ``key=value`` texts, over those of ``base``. Raises InputError that lists the keys there are."""
    from sfumato.cli.train import _as
    from sfumato.core.errors import InputError
    from sfumato.distillation import Settings

    kinds = {f.name: type(f.default) for f in dataclasses.fields(Settings)}
    values = dict(base)
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}: write key=value")
        if key not in kinds or key in ("method", "steps"):
            raise InputError(
                f"no setting {key!r}; there are: {', '.join(k for k in kinds if k not in ('method', 'steps'))}"
            )
        values[key] = _as(kinds[key], key, value)
    return Settings(**values)
