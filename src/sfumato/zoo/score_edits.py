"""How near an edit comes to the true one, and what it leaves alone, by pixels and by the judge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.evaluation.measurement import Measurement
from sfumato.zoo.edits import Edits
from sfumato.zoo.encoders import embed_images, load_encoder

JUDGE = "emoji-judge"


def rms(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Root mean square difference of uint8 images (N, C, H, W) an item, in [0, 255], over the pixels where mask is 1."""
    square = (x.float() - y.float()).square().mean(1, keepdim=True)
    if mask is None:
        return square.flatten(1).mean(1).sqrt()
    return ((square * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)).sqrt()


def measured(edits: Edits, images: Tensor) -> dict[str, Tensor]:
    """What is known of each edit (N,), for uint8 ``images`` (N, 3, H, W) that a method made of ``edits.before``.

    distance  rms to the truth over rms of the original to the truth: 1 is nothing done, 0 is the true edit
    changed   rms to the original outside the mask, of 255: what should have stayed; nan where everything may change
    reached   1 where the judge's embedding is nearer to the truth's than to the original's
    likeness  cosine of the judge's embeddings of the edit and of the truth
    """
    judge: Any = load_encoder(JUDGE)
    ours, true, given = (embed_images(judge, x) for x in (images, edits.after, edits.before))
    near, far = (ours * true).sum(1), (ours * given).sum(1)
    outside = 1 - edits.mask
    changed = rms(images, edits.before, outside)
    return {
        "distance": rms(images, edits.after) / rms(edits.before, edits.after),
        "changed": torch.where(outside.flatten(1).sum(1) > 0, changed, torch.nan),
        "reached": (near > far).double(),
        "likeness": near.double(),
    }


def summary(found: dict[str, Tensor]) -> dict[str, Measurement]:
    """Median distance and change, share reached, mean likeness, each with its interval."""
    known = found["changed"][~found["changed"].isnan()]
    made = {
        "distance": Measurement.median("distance", found["distance"].double()),
        "reached": Measurement.share("reached", found["reached"].bool()),
        "likeness": Measurement.mean("likeness", found["likeness"]),
    }
    return made | ({"changed": Measurement.median("changed", known.double())} if len(known) else {})


__all__ = ["JUDGE", "measured", "rms", "summary"]
