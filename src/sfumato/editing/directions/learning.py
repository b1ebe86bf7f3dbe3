"""What leads from some pictures to others, learned by a frozen model, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Denoiser, InputError
from sfumato.denoisers.features import bottleneck
from sfumato.editing.boundary import (
    FEWEST,
    Boundaries,
    Encoded,
    LinearBoundary,
    critical_time,
    cross_validated,
    encode,
)
from sfumato.editing.directions.base import Direction, collect, collect_noised
from sfumato.editing.directions.statistics import mean_difference, principal
from sfumato.files import write_atomically
from sfumato.pipeline import Pipeline
from sfumato.tuning.card import fingerprint

METHODS = ("boundary-diffusion", "h-space")
LEVELS = 10


@dataclass(frozen=True)
class Learned:
    """direction: Boundaries or a Direction; card: what it was learned from, JSON values with the model's ``fingerprint``."""

    direction: Boundaries | Direction
    card: Mapping[str, Any]

    def save(self, path: str | Path) -> Path:
        """One safetensors file with all that is no tensor as JSON in its metadata."""
        from safetensors.torch import save

        tensors, facts = _flat(self.direction)
        text = json.dumps({"direction": facts, "card": dict(self.card)}, ensure_ascii=False)
        path = Path(path)
        data = save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, {"sfumato": text})
        write_atomically(path, data)
        return path


@torch.no_grad()
def learn(
    pipeline: Pipeline,
    before: Tensor | None = None,
    after: Tensor | None = None,
    *,
    method: str = "boundary-diffusion",
    time: float | None = None,
    component: int = 0,
    n: int = 40,
    steps: int = 20,
    path: str | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Learned:
    """What the edit ``method`` follows from the pictures ``before`` to the pictures ``after``, uint8 (N, 3, H, W) each.

    'boundary-diffusion'  hyperplanes between both in the state and in h, at ``time`` (None: found, see
                          :func:`sfumato.editing.boundary.critical_time`). The card tells their accuracy in cross validation
    'h-space'             the difference of the means of h at every time; without ``after`` the principal component number
                          ``component`` of h, of ``before`` or of ``n`` generated pictures

    steps  of a run from t = 0 to 1; path: the submodule whose output is h (default: the bottleneck)
    cond   raw conditions under which all are read (default: the null ones), to be given again at the edit

    ``sf.edit(..., method=method, direction=learned.direction)`` uses it. Raises InputError where pictures are missing.
    """
    if method not in METHODS:
        raise InputError(f"method = {method!r}: directions are learned for {' and '.join(METHODS)}")
    if after is not None and before is None:
        raise InputError("pictures to lead to, and none to lead from: give both")
    if component and (after is not None or method != "h-space"):
        raise InputError(
            f"component = {component} is a principal component of one kind of pictures, for h-space: leave it out"
        )
    denoiser, parts = pipeline.denoiser.eval(), [p for p in (before, after) if p is not None]
    path = bottleneck(denoiser) if path is None else path
    device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    data = torch.cat([pipeline.codec.encode(part.to(device)) for part in parts]) if parts else None
    labels = torch.arange(sum(map(len, parts))) >= len(parts[0]) if len(parts) == 2 else None
    told = pipeline.conditions(n if data is None else len(data), **(cond or {}))
    options: dict[str, Any] = {"cond": told, "path": path}
    card = {"method": method, "path": path, "steps": steps, "cond": dict(cond or {}), "seed": seed}
    card |= {"fingerprint": fingerprint(denoiser), "pictures": [len(part) for part in parts] or [n]}
    if method == "boundary-diffusion":
        if data is None or labels is None:
            raise InputError("a boundary lies between two kinds of pictures: give both")
        if min(map(len, parts)) < FEWEST:
            given = " and ".join(str(len(part)) for part in parts)
            raise InputError(f"{given} pictures: a boundary is learned from at least {FEWEST} of each kind")
        if time is None and steps % LEVELS:
            raise InputError(
                f"steps = {steps}: the critical time is sought at {LEVELS} levels: give a multiple, or time="
            )
        return _boundaries(denoiser, data, labels, time, steps, seed, options, card)
    if time is not None:
        raise InputError("h-space directions are of all times: leave out time=")
    if data is None:
        options |= {"n": n, "shape": pipeline.codec.shape(*pipeline.size)}
    return _h_space(denoiser, data, labels, component, steps, seed, options, card)


def _h_space(
    denoiser: Denoiser,
    data: Tensor | None,
    labels: Tensor | None,
    component: int,
    steps: int,
    seed: int,
    options: Mapping[str, Any],
    card: Mapping[str, Any],
) -> Learned:
    """The difference of two means of h, or a principal component of h, of noised data or of a run from noise."""
    if data is None:
        latents = collect(denoiser, steps=steps, seed=seed, **options)
    else:
        latents = collect_noised(denoiser, data, steps=steps, seed=seed, **options)
    if labels is not None:
        return Learned(mean_difference(latents, labels), card)
    return Learned(principal(latents, component + 1)[component], {**card, "component": component})


def _boundaries(
    denoiser: Denoiser,
    data: Tensor,
    labels: Tensor,
    time: float | None,
    steps: int,
    seed: int,
    options: Mapping[str, Any],
    card: Mapping[str, Any],
) -> Learned:
    """Hyperplanes at the given time, or at the critical one."""
    curve: Any = []
    if time is None:
        time, curve = critical_time(denoiser, data, labels, levels=LEVELS, steps=steps, cond=options["cond"], seed=seed)
    if not 0 < time <= 1:
        raise InputError(f"time = {time}: in (0, 1]")
    found: Encoded = encode(denoiser, data, time, steps=max(1, round(steps * time)), **options)
    planes = [LinearBoundary.fit(latent, labels) for latent in found]
    accuracy = {space: cross_validated(latent, labels) for space, latent in zip("xh", found, strict=True)}
    searched = [level._asdict() for level in curve]
    boundaries = Boundaries(planes[0], planes[1], time, options["path"])
    return Learned(boundaries, {**card, "time": time, "accuracy": accuracy, "levels": searched})


def load(path: str | Path) -> Learned:
    """What :meth:`Learned.save` wrote. FileNotFoundError where there is nothing, InputError for any other file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no direction {path}: `sfumato directions MODEL --out {path}` learns one")
    try:
        with safe_open(path, "pt") as file:
            known = json.loads((file.metadata() or {})["sfumato"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no mapping)
            return Learned(_whole(tensors, known["direction"]), known["card"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no direction of `sfumato directions` ({type(error).__name__}: {error})") from error


def opened(direction: Any, denoiser: Denoiser) -> Boundaries | Direction:
    """The direction itself, or the one in a file, which must have been learned with this denoiser (InputError)."""
    if isinstance(direction, (Boundaries, Direction)):
        return direction
    learned = load(direction)
    if learned.card.get("fingerprint") != fingerprint(denoiser):
        raise InputError(
            f"{direction} was learned with another model{_named(learned.card)}: learn it with this one, or give the direction "
            "itself, sf.editing.directions.load(path).direction"
        )
    return learned.direction


def _named(card: Mapping[str, Any]) -> str:
    """The model's name for a message, where the card has it."""
    return f", {card['model']}" if card.get("model") else ""


def _flat(direction: Boundaries | Direction) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors by name, all else as JSON can hold it)."""
    if isinstance(direction, Direction):
        return {"vectors": direction.vectors}, {"kind": "h-space", "times": direction.times, "path": direction.path}
    planes = {"x": direction.x, "h": direction.h}
    numbers = {name: {"offset": plane.offset, "spread": plane.spread} for name, plane in planes.items()}
    facts = {"kind": "boundary-diffusion", "time": direction.time, "path": direction.path, **numbers}
    return {name: plane.normal for name, plane in planes.items()}, facts


def _whole(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Boundaries | Direction:
    """What :func:`_flat` took apart."""
    if facts["kind"] == "h-space":
        return Direction(tensors["vectors"], tuple(facts["times"]), facts["path"])
    if facts["kind"] != "boundary-diffusion":
        raise InputError(f"a direction for {facts['kind']!r}: known are {', '.join(METHODS)}")
    planes = [LinearBoundary(tensors[name], **facts[name]) for name in "xh"]
    return Boundaries(planes[0], planes[1], facts["time"], facts["path"])


__all__ = ["METHODS", "Learned", "learn", "load", "opened"]
