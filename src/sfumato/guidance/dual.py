"""Two scales: one for a picture that is read, one for the words beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError
from sfumato.guidance._beliefs import apart, beliefs, combine, like
from sfumato.guidance._registry import register
from sfumato.guidance.classifier_free import ClassifierFree, scale_at

PICTURES = ("channels", "image", "control", "image_prompt")


class Dual(ClassifierFree):
    """See :func:`dual`."""

    called = "dual"

    def __init__(
        self,
        inner: Denoiser,
        scale: float,
        image_scale: float = 1.5,
        images: Sequence[str] = PICTURES,
        interval: tuple[float, float] | None = None,
        null: Mapping[str, Any] | None = None,
        batched: bool = True,
    ) -> None:
        super().__init__(inner, scale, interval, null=null, batched=batched)
        self.image_scale, self.images = image_scale, tuple(images)

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        own, negatives = apart(ctx.cond, "negative")
        scales = [scale_at(t, scale, self.interval) for scale in (self.scale, self.image_scale)]
        if not any(isinstance(s, Tensor) for s in scales) and scales == [1, 1]:
            return self.inner(x, t, ctx.fork("conditional", cond=own))
        found = beliefs(
            self.inner, x, t, ctx, self._sets(own, negatives), batched=self.batched, together="both", name=self.called
        )
        words, picture = scales
        return combine(found, [words, picture - words, 1.0 - picture])

    def _sets(self, own: dict[str, Any], negatives: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Words and picture, the picture alone, and neither."""
        read = [key for key in own if key in self.images]
        if not read:
            raise InputError(
                f"no picture among the conditions {sorted(own)}: dual guidance needs one of {', '.join(self.images)}; give "
                "images=(name,) for another, or use cfg"
            )
        both = super()._sets(own, negatives)
        null = both.pop("unconditional")
        known = {key: v for key, v in (self.inner.null if self.empty is None else self.empty).items() if key in read}
        blank = {key: like(known.get(key, 0.0), own[key]) for key in read}
        return {**both, "picture": null | {key: own[key] for key in read}, "neither": null | blank}


@register("dual")
def dual(
    scale: float,
    image_scale: float = 1.5,
    *,
    images: Sequence[str] = PICTURES,
    interval: tuple[float, float] | None = None,
    null: Mapping[str, Any] | None = None,
    batched: bool = True,
) -> Guidance:
    """InstructPix2Pix guidance: one scale towards the words, another towards the picture that is read with them,

        neither + image_scale (picture - neither) + scale (picture and words - picture).

    images  the names of the conditions that are pictures; their null is the model's, else zeros. Those that are not there
            do not matter, but one must be

    scale, interval, null and batched are those of :func:`cfg`; a negative prompt takes the place of the words' null. Equal
    scales are ``cfg`` between all and nothing, image_scale = 1 is ``cfg`` of the words alone. Three rows an item. Source:
    Brooks, Holynski, Efros, 2023, "InstructPix2Pix: Learning to Follow Image Editing Instructions".
    """
    return lambda inner: Dual(inner, scale, image_scale, images, interval, null, batched)


__all__ = ["Dual", "dual"]
