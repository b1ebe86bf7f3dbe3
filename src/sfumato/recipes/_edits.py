"""What recipes of editing share: methods on edits whose truth is known, paired comparisons, and strips of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from sfumato import editing
from sfumato.evaluation.measurement import Interval, bootstrap_interval
from sfumato.recipes import _plots as plots
from sfumato.zoo.edits import Edits
from sfumato.zoo.score_edits import measured


class Arm(NamedTuple):
    """images uint8 (N, 3, H, W); figures by name (N,), see ``zoo.score_edits.measured``; calls an image."""

    images: Tensor
    figures: dict[str, Tensor]
    calls: float

    def mean(self, name: str) -> float:
        """The mean of a figure where it is known."""
        return float(self.figures[name].double().nanmean())


def tried(pipeline: Any, edits: Edits, methods: Mapping[str, Any], seed: int, **sampling: Any) -> dict[str, Arm]:
    """Each method (a spec, an object, or (one of those, options of its own)) on the same edits with the same sampler."""
    arms = {}
    for name, given in methods.items():
        method, options = given if isinstance(given, tuple) else (given, {})
        told: dict[str, Any] = {
            "cond": edits.cond,
            "source": edits.source,
            "source_cond": edits.source_cond,
            "seed": seed,
        }
        found = editing.perform(pipeline, edits.before, edits.target, method=method, **told, **{**sampling, **options})
        arms[name] = Arm(found.images, measured(edits, found.images), found.nfe)
    return arms


def ratio(ours: Tensor, baseline: Tensor, seed: int) -> Interval:
    """The 95 % bootstrap interval of the geometric mean of ours / baseline, item by item."""
    logs = (ours / baseline).double().log()
    return bootstrap_interval(lambda d: d.mean().exp(), logs, resamples=1000, seed=seed)


def said(name: str, arm: Arm) -> str:
    """One line about an arm."""
    parts = [f"distance {arm.mean('distance'):.3f}", f"reached {arm.mean('reached'):.2f}"]
    parts += [f"changed outside the mask {arm.mean('changed'):.1f}"] if not arm.figures["changed"].isnan().all() else []
    return f"{name} {', '.join(parts)}"


def strips(figure: Any, rows: Mapping[str, Tensor], columns: int = 8, title: str = "") -> None:
    """A row of pictures for each name, ``columns`` of them."""
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for ax, (name, images) in zip(axes, rows.items(), strict=True):
        plots.show(ax, images[:columns], columns)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8, size=9)
    axes[0].set_title(title)


__all__ = ["Arm", "ratio", "said", "strips", "tried"]
