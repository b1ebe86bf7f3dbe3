"""Figures of nearest neighbours: precision and recall, density and coverage, memorisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.core.errors import InputError
from sfumato.evaluation.measurement import Measurement
from sfumato.evaluation.metrics._tensors import (
    blocks,
    count,
    features,
    nearest,
    pair,
    round_off,
    same_width,
    squared_distances,
)


def precision_recall(samples: Tensor, reference: Tensor, *, k: int = 3) -> tuple[Measurement, Measurement]:
    """Precision: the share of samples inside a ball around some reference item; recall: the same with roles exchanged.

    The ball of an item reaches to its k-th nearest neighbour in its own set. Both depend on the counts. The intervals
    are Wilson's with the balls held fixed. Source: Kynkaanniemi, Karras, Laine, Lehtinen, Aila (2019), Improved
    precision and recall metric for assessing generative models.

    Raises:
        InputError: widths that differ, values that are not finite, or a set of no more than k items.
    """
    x, y = pair(samples, reference)
    inside_x, _ = _inside(x, y, _radii("reference", y, k))
    inside_y, _ = _inside(y, x, _radii("samples", x, k))
    labels = {"reference_n": len(y), "higher_is_better": True}
    precision = Measurement.share("precision", (inside_x > 0).double(), note=f"k = {k}, balls fixed", **labels)
    recall = Measurement.share("recall", (inside_y > 0).double(), note=f"k = {k}, balls fixed", **labels)
    # The share of recall is over reference items, but n stays the number of samples, as in every other figure.
    return precision, recall.labelled(n=len(x))


def density_coverage(samples: Tensor, reference: Tensor, *, k: int = 5) -> tuple[Measurement, Measurement]:
    """Density: the mean number of reference balls a sample lies in, over k; coverage: the share of balls with a sample.

    Only reference items have balls, so stray samples cannot inflate either figure. For two samples of one law
    E[density] = 1, and with n samples and m reference items E[coverage] = 1 - prod_{i<k} (m - 1 - i) / (n + m - 1 - i):
    density is best near 1, coverage higher. The intervals (Student, Wilson) hold the balls fixed. Source: Naeem, Oh,
    Uh, Choi, Yoo (2020), Reliable fidelity and diversity metrics for generative models.

    Raises:
        InputError: as :func:`precision_recall`.
    """
    x, y = pair(samples, reference)
    balls, covered = _inside(x, y, _radii("reference", y, k))
    density = Measurement.mean(
        "density", balls.double() / k, reference_n=len(y), note=f"k = {k}, balls fixed; 1 is ideal"
    )
    coverage = Measurement.share("coverage", covered.double(), reference_n=len(y), note=f"k = {k}, balls fixed")
    return density, coverage.labelled(n=len(x), higher_is_better=True)


def expected_coverage(n: int, m: int, k: int = 5) -> float:
    """The coverage of n samples that follow the law of the m reference items exactly."""
    missed = 1.0
    for i in range(k):
        missed *= (m - 1 - i) / (n + m - 1 - i)
    return 1 - missed


def _radii(name: str, x: Tensor, k: int) -> Tensor:
    count("k", k, 1, len(x) - 1, f"neighbours of an item among the other {len(x) - 1} {name}")
    return nearest(x, x, k, skip_self=True)[0][:, -1]


def _inside(queries: Tensor, centres: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """The number of balls each query lies in, (N,), and whether each ball holds a query, (M,)."""
    middle = centres.mean(0)
    q, c = queries - middle, centres - middle
    balls, held = [], torch.zeros(len(c), dtype=torch.bool, device=c.device)
    for rows in blocks(len(q), len(c)):
        inside = squared_distances(q[rows], c) <= radii.square() + round_off(q[rows], c)
        balls.append(inside.sum(1))
        held |= inside.any(0)
    return torch.cat(balls), held


def memorisation_rate(samples: Tensor, training: Tensor, held_out: Tensor, *, alpha: float = 0.05) -> Measurement:
    """The share of samples closer to a training item than the alpha-quantile of held-out items is; lower is better.

    Fresh data scores about alpha, copies score 1. ``held_out`` are items of the same law that were not trained on. The
    interval holds the threshold fixed. The threshold is the ceil(alpha m)-th smallest of the m held-out distances.

    Raises:
        InputError: held-out items that are training items themselves, or too few of them for this alpha.
    """
    x, train = pair(samples, training, at_least=1)
    held = features("held_out", held_out, 2).to(x.device)
    same_width("samples", x, "held_out", held)
    if not 0 < alpha < 1 or alpha * len(held) < 1:
        raise InputError(
            f"alpha = {alpha} of {len(held)} held-out items: a share in (0, 1) that holds at least one item is wanted"
        )
    usual = nearest(held, train, 1)[0][:, 0].sort().values
    # The product of a round alpha and m may exceed a whole number by round-off.
    threshold = usual[math.ceil(alpha * len(held) - 1e-9) - 1]
    if threshold == 0:
        raise InputError(
            f"{int((usual == 0).sum())} of {len(held)} held-out items occur in the training set: take them out of one"
        )
    copied = nearest(x, train, 1)[0][:, 0] <= threshold
    note = f"fresh data scores {alpha:g} (from {len(held)} held-out items)"
    return Measurement.share(
        "memorisation rate", copied.double(), reference_n=len(train), higher_is_better=False, note=note
    )


def memorisation_ratio(samples: Tensor, training: Tensor, *, ratio: float = 1 / 3) -> Measurement:
    """The share of samples with d1 < ratio d2, the distances to the nearest and second nearest training item.

    It needs no held-out items, but repeats in the training set hide copies (d2 = 0 as well), and in few dimensions
    fresh data scores well above 0. Source: Yoon, Choi, Kwon, Ryu (2023), Diffusion probabilistic models generalize when
    they fail to memorize.

    Raises:
        InputError: ratio outside (0, 1), or fewer than 2 training items.
    """
    x = features("samples", samples, 1)
    train = features("training", training, 2).to(x.device)
    same_width("samples", x, "training", train)
    if not 0 < ratio < 1:
        raise InputError(f"ratio = {ratio}: a number in (0, 1) is wanted; 1/3 is the published one")
    distances = nearest(x, train, 2)[0]
    copied = distances[:, 0] < ratio * distances[:, 1]
    note = f"nearest training item {ratio:.3g} times as far as the second"
    return Measurement.share(
        "memorisation ratio", copied.double(), reference_n=len(train), higher_is_better=False, note=note
    )
