"""``sf.editing.enlarge``: pictures larger than those a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sfumato.core import InputError, mix
from sfumato.editing.base import Method
from sfumato.editing.front import perform
from sfumato.pipeline import Pipeline
from sfumato.training.images import Picture, as_pixels


def enlarge(
    pipeline: Pipeline,
    prompts: int | str | Sequence[str] | None = None,
    *,
    sizes: Sequence[int | tuple[int, int]],
    image: Picture | None = None,
    method: str | Method = "diffusehigh",
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    base: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Pictures at the last of ``sizes``, stage by stage with a frozen model: uint8 (B, 3, H, W).

    Each stage interpolates the last picture (bicubic) to the next size and has ``method`` draw what is missing there.
    ``sf.editing.enlarge(pipeline, "a red apple", sizes=[96, 128])``.

    prompts  as for ``pipeline.generate``, which makes the first picture; or what ``image`` shows
    sizes    one side (of a square) or (height, width) a stage, growing from the pipeline's own size; the network must take them
    image    a picture to begin with in the place of a generated one: a file (brought to the pipeline's size) or uint8 (B, 3, H, W)
    method   an editing method that takes a picture at its final size, with its numbers: "diffusehigh(structure=7)"
    base     options of ``pipeline.generate`` for the first picture: steps, solver, guidance
    options  of every stage as for ``sf.edit``: steps (of a whole run, 50), solver, grid, guidance, numbers of the method

    Image i depends on (seed, i) only. Raises InputError for sizes that do not grow, and where codec or network cannot take them.
    """
    images = _first(pipeline, prompts, image, cond, seed, base)
    if not sizes:
        raise InputError("sizes is empty: give the sizes of the stages, such as [96, 128]")
    stages = [(s, s) if isinstance(s, int) else tuple(s) for s in sizes]
    for before, after in pairwise([tuple(images.shape[-2:]), *stages]):
        if len(after) != 2 or not (after[0] >= before[0] and after[1] >= before[1] and after != before):
            raise InputError(f"sizes = {list(sizes)}: they grow from {tuple(images.shape[-2:])}, each beyond the last")
        pipeline.codec.shape(*after)
    texts = None if isinstance(prompts, int) else prompts
    for stage, size in enumerate(stages):
        wide = interpolate(images.float(), size=size, mode="bicubic", align_corners=False)
        soft = wide.round().clamp(0, 255).to(torch.uint8)
        images = perform(pipeline, soft, texts, method=method, cond=cond, seed=mix(seed, stage + 1), **options).images
    return images


def _first(
    pipeline: Pipeline,
    prompts: int | str | Sequence[str] | None,
    image: Picture | None,
    cond: Mapping[str, Any] | None,
    seed: int,
    base: Mapping[str, Any] | None,
) -> Tensor:
    """The picture of the first size."""
    if image is None:
        if prompts is None:
            raise InputError("give prompts (or how many pictures), or the image to enlarge")
        return pipeline.generate(prompts, cond=cond, seed=seed, **(base or {}))
    if base:
        raise InputError(f"a given image is not generated: leave out base={sorted(base)}")
    return as_pixels(image, pipeline.size)


__all__ = ["enlarge"]
