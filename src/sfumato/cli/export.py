"""``sfumato export``: a model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli._app import Answer, command


@command("export")
def export(
    to: Annotated[str, typer.Option(help="diffusers, safetensors, onnx or comfyui.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A bundled name, a saved folder, or a folder of diffusers; comfyui needs none."
        ),
    ] = None,
) -> Answer:
    """Write a model for other programs, e.g. `sfumato export digits --to onnx --out digits-onnx`."""
    from sfumato.cli._places import folder
    from sfumato.interop import export as write

    folder(out)
    record = {"model": model, **write(None if model is None or to == "comfyui" else _model(model), to, out)}
    return Answer(record, _shown(record))


def _model(name: str) -> Any:
    import sfumato

    if (Path(name) / "model_index.json").exists():
        return sfumato.from_diffusers(name)
    return sfumato.load(name)


def _shown(record: dict[str, Any]) -> str:
    size = sum(record["files"].values())
    lines = [
        f"{record['out']}: {record['model'] or 'the node pack'} for {record['to']}, {len(record['files'])} files, {size / 1e6:.1f} MB"
    ]
    if "load" in record:
        lines.append(f"load it: {record['load']}")
    for part, worst in record.get("difference", {}).items():
        shown = "onnxruntime is not installed, so it was not compared" if worst is None else f"differs by {worst:.1e}"
        lines.append(f"{part}: {shown}")
    return "\n".join(lines)
