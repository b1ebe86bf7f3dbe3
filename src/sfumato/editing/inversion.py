"""Pictures to the noise that draws them, and how exactly they come back: by any deterministic solver, or as noise maps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import core, grids, solvers
from sfumato.core import Context, Grid, Guidance, InputError, Step
from sfumato.editing.base import registry
from sfumato.editing.methods.recorded import Recorded, drawing
from sfumato.editing.recorded import NoiseMaps, record
from sfumato.files import write_atomically
from sfumato.pipeline import Pipeline

METHODS = ("ddim", "implicit", "bdia", "edict", "bidirectional", "edit-friendly", "cycle-diffusion")


@dataclass(frozen=True)
class Inverted:
    """What draws the pictures, and what it drew.

    latent  the Step at t = strength, whole (both states of 'edict' and 'bdia'), or the NoiseMaps
    state   (B, *) the encoded pictures; back: what the latent gives
    calls   of the denoiser an image, up and down
    """

    latent: Step | NoiseMaps
    state: Tensor
    back: Tensor
    calls: float

    @property
    def error(self) -> Tensor:
        """rms(back - state) / rms(state) of each item, (B,)."""
        return _rms(self.back - self.state) / _rms(self.state)

    def save(self, path: str | Path, card: Mapping[str, Any] | None = None) -> Path:
        """The latent as safetensors, with all that is no tensor, and ``card``, as JSON in its metadata."""
        from safetensors.torch import save

        tensors, facts = _flat(self.latent)
        text = json.dumps({"latent": facts, "card": dict(card or {})}, ensure_ascii=False)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({k: v.contiguous().clone() for k, v in tensors.items()}, {"sfumato": text}))
        return path


@torch.no_grad()
def invert(
    pipeline: Pipeline,
    images: Tensor,
    prompt: str | Sequence[str] | None = None,
    *,
    method: str = "edict",
    cond: Mapping[str, Any] | None = None,
    steps: int = 50,
    strength: float = 1.0,
    grid: str | Grid | None = None,
    guidance: float | str | Guidance = 1.0,
    seed: int = 0,
) -> Inverted:
    """Take uint8 images (B, 3, H, W) to t = ``strength`` and back under the same conditions and guidance.

    method  a deterministic solver or its spec: by its inverse where it has one ('edict', 'bdia', 'implicit',
            'bidirectional'), on the flipped grid where not ('ddim', 'heun', ...); or 'edit-friendly', 'cycle-diffusion'
            (``eta=`` of theirs counts, all else is given here)
    steps   of the run from t = strength to 0
    seed    of the noise maps; solvers draw nothing

    Raises InputError for a method that cannot invert.
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength = {strength}: above 0 (nothing happens) and at most 1 (to pure noise)")
    texts = [prompt] * len(images) if isinstance(prompt, str) else prompt
    device = next((p.device for p in pipeline.denoiser.parameters()), torch.device("cpu"))
    x0, told = pipeline.codec.encode(images.to(device)), pipeline.conditions(len(images), texts, **(cond or {}))
    denoiser = pipeline.guided(guidance)

    def context() -> Context:
        return Context.of(len(x0), seed, cond=told, dtype=x0.dtype, device=x0.device)

    def times(own: str | None) -> Grid:
        chosen = (own or pipeline.grid) if grid is None else grid
        return grids.registry.make(chosen) if isinstance(chosen, str) else chosen

    up, down = context(), context()
    if method.partition("(")[0] in ("edit-friendly", "cycle-diffusion"):
        recorder: Recorded = registry.make(method)
        chosen = drawing(solvers.get("ddim"), recorder.eta)
        maps = record(
            denoiser, x0, solver=chosen, grid=times(None), steps=steps, path=recorder.path, start=strength, ctx=up
        )
        back = maps.decode(denoiser, ctx=down)
        return Inverted(maps, x0, back, up.run.nfe + down.run.nfe)
    solver = solvers.registry.make(method)
    climbing = solver.inverse() if solver.reversible else solver
    *_, top = core.trajectory(denoiser, climbing, times(solver.grid), steps, x=x0, start=0.0, stop=strength, ctx=up)
    latent = top.restart() if solver.reversible else Step(climbing.read(top), top.t)
    begin: Any = latent if solver.reversible else latent.x
    *_, end = core.trajectory(denoiser, solver, times(solver.grid), steps, x=begin, start=strength, ctx=down)
    back = solver.read(end)  # type: ignore[assignment]
    return Inverted(latent, x0, back, up.run.nfe + down.run.nfe)


def load(path: str | Path) -> tuple[Step | NoiseMaps, dict[str, Any]]:
    """(latent, card) that :meth:`Inverted.save` wrote: a Step for ``sf.sample(..., x=step)``, or NoiseMaps.

    Raises InputError for any other file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            known = json.loads((file.metadata() or {})["sfumato"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no mapping)
            return _whole(tensors, known["latent"]), known["card"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no latent of `sfumato invert` ({type(error).__name__}: {error})") from error


def _flat(latent: Step | NoiseMaps) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors by name, all else as JSON can hold it)."""
    if isinstance(latent, Step):
        carry = latent.carry or ()
        tensors: dict[str, Any] = {
            "x": latent.x,
            **{f"carry.{i}": v for i, v in enumerate(carry) if isinstance(v, Tensor)},
        }
        rest = [None if isinstance(v, Tensor) else v for v in carry]
        return tensors, {"kind": "step", "t": latent.t, "carry": rest}
    tensors = {f"states.{i}": v for i, v in enumerate(latent.states)}
    tensors |= {f"noise.{i}": v for i, v in enumerate(latent.noise)}
    tensors |= {f"missing.{i}": v for i, v in enumerate(latent.missing) if v is not None}
    process = {"name": type(latent.process).__name__, "coefficients": _law(latent.process, latent.times)}
    return tensors, {"kind": "maps", "times": latent.times, "eta": latent.solver.eta, "process": process}  # type: ignore[attr-defined]


def _whole(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Step | NoiseMaps:
    """What :func:`_flat` took apart."""
    if facts["kind"] == "step":
        carry = tuple(tensors[f"carry.{i}"] if v is None else v for i, v in enumerate(facts["carry"]))
        return Step(tensors["x"], facts["t"], carry or None)
    n = len(facts["times"])
    return NoiseMaps(
        Kept({t: (a, b) for t, a, b in facts["process"]["coefficients"]}),
        tuple(facts["times"]),
        tuple(tensors[f"states.{i}"] for i in range(n)),
        tuple(tensors[f"noise.{i}"] for i in range(n - 1)),
        tuple(tensors.get(f"missing.{i}") for i in range(n - 1)),
        drawing(solvers.get("ddim"), facts["eta"]),
    )


@dataclass(frozen=True)
class Kept:
    """The law of a process at the times that were kept: enough to tell whether another is the same."""

    known: Mapping[float, tuple[float, float]]

    def coef(self, t: float) -> Any:
        """alpha and sigma at a kept time."""
        return core.Coef(*self.known[t], 0.0, 0.0)


def _law(process: Any, times: Sequence[float]) -> list[tuple[float, float, float]]:
    """(t, alpha, sigma) at each of the times."""
    return [(t, *process.coef(t)[:2]) for t in times]


def _rms(x: Tensor) -> Tensor:
    """The root mean square of each item, (B,)."""
    return x.flatten(1).double().square().mean(1).sqrt()


__all__ = ["METHODS", "Inverted", "invert", "load"]
