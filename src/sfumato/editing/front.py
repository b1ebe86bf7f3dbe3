"""``sf.edit``: one front door for every editing method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato import grids, solvers
from sfumato import guidance as guidances
from sfumato.core import Grid, Guidance, InputError, Solver
from sfumato.editing.base import Method, Task, registry
from sfumato.editing.directions.learning import opened
from sfumato.guidance import cfg
from sfumato.pipeline import Pipeline, load
from sfumato.training.images import Picture, as_pixels


@dataclass(frozen=True)
class Edited:
    """images: uint8 (B, 3, H, W); state: the edited x0 in the space of the process; nfe: network calls an image."""

    images: Tensor
    state: Tensor
    nfe: float


@torch.no_grad()
def perform(
    pipeline: Pipeline,
    image: Picture,
    prompt: str | Sequence[str] | None = None,
    *,
    method: str | Method = "edit-friendly",
    source: str | Sequence[str] | None = None,
    cond: Mapping[str, Any] | None = None,
    source_cond: Mapping[str, Any] | None = None,
    mask: Picture | None = None,
    points: Sequence[Sequence[float]] = (),
    reference: Picture | None = None,
    direction: Any = None,
    steps: int | None = None,
    solver: str | Solver | None = None,
    grid: str | Grid | None = None,
    guidance: float | str | Guidance | None = None,
    seed: int = 0,
    **numbers: Any,
) -> Edited:
    """:func:`edit`, with the state and the number of calls beside the images."""
    images = as_pixels(image, pipeline.size)
    n = len(images)
    method, name = _method(method, numbers)
    said = {
        "prompt": prompt is not None or bool(cond), "source": source is not None or bool(source_cond),
        "mask": mask is not None, "points": bool(len(points)), "reference": reference is not None,
        "direction": direction is not None,
    }  # fmt: skip
    given = frozenset(key for key, yes in said.items() if yes)
    method.check(name, given)
    shared = cond or {}
    target = pipeline.conditions(n, _texts(prompt, n, "prompt"), **shared)
    described = pipeline.conditions(n, _texts(source, n, "source"), **(shared if source_cond is None else source_cond))
    around, scale = _around(pipeline, guidance)
    device = next((p.device for p in pipeline.denoiser.parameters()), torch.device("cpu"))
    other = None if reference is None else _reference(reference, images)
    task = Task(
        denoiser=pipeline.denoiser,
        codec=pipeline.codec,
        x0=pipeline.codec.encode(images.to(device)),
        images=images,
        source=described,
        target=target,
        guidance=around,
        scale=scale,
        **_sampler(pipeline, solver, grid),
        steps=50 if steps is None else steps,
        mask=None if mask is None else _mask(mask, images),
        points=_points(points, images),
        reference=None if other is None else pipeline.codec.encode(other.to(device)).expand(n, -1, -1, -1),
        direction=None if direction is None else opened(direction, pipeline.denoiser),
        seed=seed,
        given=given,
    )
    x: Any = method(task)
    return Edited(pipeline.codec.images(x), x, task.nfe[0])


def edit(pipeline: Pipeline, image: Picture, prompt: str | Sequence[str] | None = None, **options: Any) -> Tensor:
    """Edit images with a frozen model: uint8 (B, 3, H, W) of the size that went in.

    image        a file or a Pillow image (brought to the model's size on white), a uint8 tensor (3, H, W) or (B, 3, H, W), or a
                 uint8 array (H, W, 3)
    prompt       what the result shows, one or one an image; ``cond`` holds other raw conditions ({"vendor": "noto"})
    method       a slug (``sf.editing.names()`` lists them), a spec "edict(strength=0.8)", or an object; its numbers may be
                 given as keywords: ``edit(..., method="edict", strength=0.8)``
    source       what the images show; ``source_cond``: its other conditions (default: those of ``cond``)
    mask         where they may change: a file or Pillow image (white inside), or a tensor or array (H, W), (1, H, W) or
                 (B, 1, H, W) in [0, 1]
    points       [(from x, from y, to x, to y), ...] in pixels, for methods that move or drag
    reference    a second image, for methods that mix or paste
    direction    what `sfumato directions` or ``sf.editing.directions.learn`` learned: its file, or the object
    steps, solver, grid, guidance, seed   the sampler of the edit: 50 DDIM steps and the pipeline's guidance by default

    Raises InputError where the method needs what is not given, is given what it does not use, or the model cannot read it.
    ``sf.editing.perform`` takes the same and also returns the state and the calls.
    """
    return perform(pipeline, image, prompt, **options).images


def _nothing(denoiser: Any) -> Any:
    """The guidance that is none."""
    return denoiser


def _around(pipeline: Pipeline, guidance: float | str | Guidance | None) -> tuple[Guidance, float | None]:
    """(the guidance, its scale where it is classifier-free) of what was given, or else of the pipeline."""
    chosen = pipeline.guidance if guidance is None else guidance
    chosen = guidances.get(chosen, load=lambda name: load(name).denoiser) if isinstance(chosen, str) else chosen
    if not isinstance(chosen, (int, float)):
        return chosen, None  # type: ignore[return-value]
    return (_nothing if chosen == 1 else cfg(float(chosen))), float(chosen)


def _sampler(pipeline: Pipeline, solver: str | Solver | None, grid: str | Grid | None) -> dict[str, Any]:
    """solver= and grid= as objects: DDIM, and the solver's own grid or the pipeline's, where nothing was said."""
    chosen = solvers.registry.make(spec) if isinstance(spec := solver or "ddim", str) else spec
    times = (chosen.grid or pipeline.grid) if grid is None else grid
    return {"solver": chosen, "grid": grids.registry.make(times) if isinstance(times, str) else times}


def _reference(reference: Picture, images: Tensor) -> Tensor:
    """The second image, uint8 at the size of the others."""
    other = as_pixels(reference, (images.shape[-2], images.shape[-1]), what="reference")
    if other.shape[-3:] != images.shape[-3:]:
        raise InputError(f"image {tuple(images.shape[-2:])} and reference {tuple(other.shape[-2:])} differ in size")
    return other


def _method(method: str | Method, numbers: Mapping[str, Any]) -> tuple[Method, str]:
    """The method as an object, and the name by which it was asked for."""
    if isinstance(method, Method):
        if numbers:
            raise InputError(f"an object brings its own numbers: leave out {sorted(numbers)}")
        return method, type(method).__name__
    name = method.partition("(")[0].strip()
    if "(" in method and numbers:
        raise InputError(f"give the numbers of {method!r} in the spec or as keywords, not both")
    return (registry.make(method) if "(" in method else registry.get(name, **numbers)), name


def _texts(given: str | Sequence[str] | None, n: int, what: str) -> list[str] | None:
    """One text an image, or None."""
    texts = [given] * n if isinstance(given, str) else None if given is None else list(given)
    if texts is not None and len(texts) != n:
        raise InputError(f"{len(texts)} texts in {what}= for {n} images: give one, or one an image")
    return texts


def _mask(mask: Picture, images: Tensor) -> Tensor:
    """The mask as floats (B, 1, H, W) in [0, 1]."""
    height, width = images.shape[-2:]
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(mask.copy())
    elif not isinstance(mask, Tensor):
        mask = as_pixels(mask, (height, width), background=(0, 0, 0), what="mask").float().mean(1, keepdim=True) / 255
    if not mask.dtype.is_floating_point:
        mask = mask.float() if mask.dtype == torch.bool or mask.max() <= 1 else mask.float() / 255
    mask = mask.reshape(1, 1, *mask.shape[-2:]) if mask.ndim == 2 or (mask.ndim == 3 and len(mask) == 1) else mask
    wanted = (len(images), 1, *images.shape[-2:])
    if mask.ndim != 4 or mask.shape[1:] != wanted[1:] or len(mask) not in (1, wanted[0]):
        raise InputError(f"a mask of shape {tuple(mask.shape)} does not fit images {tuple(images.shape)}")
    if not (mask.min() >= 0 and mask.max() <= 1):
        raise InputError(f"a mask lies in [0, 1], not [{mask.min():g}, {mask.max():g}]")
    if mask.max() == 0:
        raise InputError("the mask is empty: nothing may change")
    return mask.expand(wanted)


def _points(points: Sequence[Sequence[float]], images: Tensor) -> tuple[tuple[float, float, float, float], ...]:
    """The points as floats, all of them inside the image."""
    height, width = images.shape[-2:]
    out = []
    for point in points:
        if len(point) != 4:
            raise InputError(f"a point is (from x, from y, to x, to y), not {tuple(point)}")
        x, y, u, v = map(float, point)
        if not (0 <= x < width and 0 <= u < width and 0 <= y < height and 0 <= v < height):
            raise InputError(f"the point {tuple(point)} lies outside the image of {width} x {height} pixels")
        out.append((x, y, u, v))
    return tuple(out)


__all__ = ["Edited", "edit", "perform"]
