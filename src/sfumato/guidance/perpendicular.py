"""Negative prompts that take nothing away from the prompt itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError
from sfumato.guidance._beliefs import combine, like, reading
from sfumato.guidance._registry import register
from sfumato.guidance.classifier_free import ClassifierFree


class PerpNeg(ClassifierFree):
    """See :func:`perp_neg`."""

    called = "perp-neg"

    def __init__(
        self,
        inner: Denoiser,
        scale: float,
        weight: float | Sequence[float] = 1.0,
        negative: Sequence[Mapping[str, Any]] = (),
        interval: tuple[float, float] | None = None,
        null: Mapping[str, Any] | None = None,
        batched: bool = True,
    ) -> None:
        super().__init__(inner, scale, interval, null=null, batched=batched)
        self.weight, self.negative = weight, tuple(negative)

    def _sets(self, own: dict[str, Any], negatives: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The prompt, nothing, and each negative."""
        given = [*self.negative, *negatives]
        if not given:
            raise InputError(
                "perp-neg needs a negative prompt: negative=[conditions], or sf.guidance.negative(...) in cond"
            )
        if not isinstance(self.weight, (int, float)) and len(self.weight) != len(given):
            raise InputError(f"{len(self.weight)} weights for {len(given)} negative prompts: give one, or one each")
        away = [own | {k: like(v, own[k]) for k, v in each.items() if k in own} for each in given]
        return {
            "conditional": own, "unconditional": own | self._null(own),
            **{f"negative.{i}": each for i, each in enumerate(away)},
        }  # fmt: skip

    def _guided(self, found: list[Any], scale: float | Tensor, ctx: Context) -> Any:
        """null + scale (p - sum of the weighed perpendicular parts), as weights of the beliefs."""
        wanted, free, *away = found
        kind = wanted.kind
        main = wanted.native - reading(free, kind)
        square = main.square().flatten(1).sum(1)
        count = len(away)
        weights = [self.weight] * count if isinstance(self.weight, (int, float)) else self.weight
        towards: Any = 1.0
        for weight, each in zip(weights, away, strict=True):  # main direction minus the perpendicular parts
            inner = ((reading(each, kind) - reading(free, kind)) * main).flatten(1).sum(1)
            towards = towards + weight * torch.where(square > 0, inner / torch.where(square > 0, square, 1.0), 0.0)
        scale = scale.to(square) if isinstance(scale, Tensor) else scale
        total = sum(weights)
        return combine(
            found, [scale * towards, 1.0 - scale * towards + scale * total, *(-scale * weight for weight in weights)]
        )


@register("perp-neg")
def perp_neg(
    scale: float,
    *,
    weight: float | Sequence[float] = 1.0,
    negative: Sequence[Mapping[str, Any]] = (),
    interval: tuple[float, float] | None = None,
    null: Mapping[str, Any] | None = None,
    batched: bool = True,
) -> Guidance:
    """Classifier-free guidance away from negative prompts, but never away from what the prompt itself asks for.

    With the difference of each belief to the null one, p of the prompt and n_i of the negatives,

        null + scale (p - sum_i weight_i (n_i - (<n_i, p> / |p|^2) p)),

    only the part of n_i that is perpendicular to p is subtracted. All are read in one call.

    weight    of the negatives, one for all or one each
    negative  their conditions, one row or one an item; else those in the conditions of the run (:func:`negative`)

    A negative that is the null, or the prompt itself, leaves :func:`cfg`, whose scale, interval, null and batched it shares.
    Raises InputError without a negative. Source: Armandpour, Sadeghian, Zheng, Sadeghian, Zhou, 2023, "Re-imagine the
    Negative Prompt Algorithm: Transform 2D Diffusion into 3D, alleviate Janus problem and Beyond".
    """
    return lambda inner: PerpNeg(inner, scale, weight, negative, interval, null, batched)


__all__ = ["PerpNeg", "perp_neg"]
