"""Models out of sfumato: to diffusers, safetensors, ONNX and a ComfyUI node pack."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.acceleration.engines import Positional, exported
from sfumato.codecs import Identity
from sfumato.core import InputError
from sfumato.files import write_atomically
from sfumato.interop._needs import need
from sfumato.pipeline import Pipeline


def export(pipeline: Pipeline | None, to: str, out: str | Path) -> dict[str, Any]:
    """Write ``pipeline`` into the folder ``out`` in a format of FORMATS: {"files": sizes by name, ...}.

    diffusers    a folder for ``SfumatoPipeline.from_pretrained`` and :func:`sfumato.from_diffusers`, equal to the last
                 bit
    safetensors  weights in float32 and one JSON: ``sf.load(out)`` gives the same model to the last bit
    onnx         denoiser.onnx (x, label and the conditions by name -> prediction), decoder.onnx and encoder.onnx of the
                 codec, with the greatest difference from PyTorch under onnxruntime where it is installed; ``batch`` is
                 'any', or the number that a network's code fixed (two rows: one picture under guidance)
    comfyui      the node pack, which needs no model

    Raises InputError for other formats, and where ``out`` is a file.
    """
    if to not in FORMATS:
        raise InputError(f"to = {to!r}: one of {', '.join(FORMATS)}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder to write to")
    if pipeline is None and to != "comfyui":
        raise InputError(f"name the model to export to {to}")
    folder.mkdir(parents=True, exist_ok=True)
    facts = FORMATS[to](pipeline, folder)
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    return {"to": to, "out": str(folder), "files": files, **facts}


def _diffusers(pipeline: Pipeline, folder: Path) -> dict[str, Any]:
    from sfumato.interop.pipelines import to_diffusers

    source = getattr(pipeline, "source", None)
    if source is not None:
        source.save_pretrained(str(folder), safe_serialization=True)
    else:
        to_diffusers(pipeline, folder)
    return {"load": f"sf.from_diffusers({str(folder)!r})"}


def _safetensors(pipeline: Pipeline, folder: Path) -> dict[str, Any]:
    from safetensors.torch import save as serialise

    if getattr(pipeline, "source", None) is not None:
        raise InputError(
            "a pipeline from diffusers is safetensors already where diffusers keeps it: export --to diffusers"
        )
    description = pipeline.description()
    tensors = {f"network.{k}": v for k, v in pipeline.denoiser.net.state_dict().items()}
    tensors |= {f"codec.{k}": v for k, v in pipeline.codec.state_dict().items()}
    plain = {k: v.contiguous().clone() for k, v in tensors.items()}
    write_atomically(folder / "model.safetensors", serialise(plain, metadata={"format": "pt"}))
    write_atomically(folder / "pipeline.json", json.dumps(description, indent=1, ensure_ascii=False).encode())
    return {"load": f"sf.load({str(folder)!r})"}


def _comfyui(pipeline: Pipeline | None, folder: Path) -> dict[str, Any]:
    source = Path(__file__).parent / "comfyui"
    for name in ("__init__.py", "nodes.py"):
        shutil.copyfile(source / name, folder / name)
    return {"load": "put the folder into ComfyUI's custom_nodes and install sfumato there"}


# ------------------------------------------------------------------------------------------------------------------ ONNX


class _Calls(nn.Module):
    """One method of a module as a module."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x: Tensor) -> Tensor:
        """The method's result."""
        return getattr(self.module, self.method)(x)  # type: ignore[no-any-return]


def _onnx(pipeline: Pipeline, folder: Path) -> dict[str, Any]:
    need("onnx", extra="onnx")
    need("onnxscript", extra="onnx")
    n = 2
    conditions = pipeline.conditions(n)
    x = torch.randn(n, *pipeline.codec.shape(*pipeline.size), generator=torch.Generator().manual_seed(0))
    label = pipeline.denoiser._label(0.5, x)
    net = Positional(pipeline.denoiser.net, tuple(conditions)).eval()
    inputs = {"x": x, "label": label, **{k: v.contiguous() for k, v in conditions.items()}}
    made = {"denoiser": _exported(net, inputs, "prediction", folder / "denoiser.onnx")}
    if not isinstance(pipeline.codec, Identity):
        codec, images = pipeline.codec.eval(), torch.rand(n, 3, *pipeline.size) * 2 - 1
        made["decoder"] = _exported(_Calls(codec, "decode"), {"code": x}, "images", folder / "decoder.onnx")
        made["encoder"] = _exported(_Calls(codec, "encode"), {"images": images}, "code", folder / "encoder.onnx")
    facts = {"predicts": pipeline.denoiser.predicts, "process": repr(pipeline.process), "conditions": list(conditions)}
    batches, worst = ({k: v[i] for k, v in made.items()} for i in (0, 1))
    return {**facts, "batch": batches, "difference": worst}


@torch.no_grad()
def _exported(module: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> tuple[Any, float | None]:
    """Write one graph, its batch size free where the code allows: (batch, the greatest difference from PyTorch in
    units of the output's greatest value)."""
    program = exported(module, inputs, output)
    program.save(str(path), external_data=False)
    size = program.model.graph.inputs[0].shape[0]
    fixed = isinstance(size, int)
    if not fixed:  # on another batch than it was traced with
        inputs = {k: torch.cat([v, v[:1]]) for k, v in inputs.items()}
    return size if fixed else "any", _difference(module, inputs, path)


def _difference(module: nn.Module, inputs: dict[str, Tensor], path: Path) -> float | None:
    try:
        runtime = need("onnxruntime", extra="onnx")
    except ImportError:
        return None
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    read = {i.name for i in session.get_inputs()}
    found = session.run(None, {k: v.numpy() for k, v in inputs.items() if k in read})[0]
    expected = module(*inputs.values())
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())


FORMATS: dict[str, Callable[[Any, Path], dict[str, Any]]] = {
    "diffusers": _diffusers, "safetensors": _safetensors, "onnx": _onnx, "comfyui": _comfyui,
}  # fmt: skip
