"""Whether a classifier's confidence is its accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.core.errors import InputError
from sfumato.evaluation.measurement import Measurement, jackknife_interval
from sfumato.evaluation.metrics._tensors import count, features


def expected_calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15, seed: int = 0) -> Measurement:
    """sum over bins of (n_b / n) |accuracy_b - confidence_b|, in [0, 1]: 0 is calibrated.

    logits (N, C) and labels (N,) int64; the confidence of an item is its largest softmax probability, and bins are of equal
    width in it. The interval is a jackknife over 20 groups. Source: Naeini, Cooper, Hauskrecht, 2015, "Obtaining Well
    Calibrated Probabilities Using Bayesian Binning"; Guo, Pleiss, Sun, Weinberger, 2017, "On Calibration of Modern Neural
    Networks". Raises InputError for shapes that do not fit.
    """
    scores = features("logits", logits, 1)
    if labels.shape != (len(scores),) or labels.is_floating_point():
        raise InputError(
            f"labels: an integer tensor ({len(scores)},) is wanted, got {labels.dtype} {tuple(labels.shape)}"
        )
    count("bins", bins, 1, 1000, "of equal width")
    confidence, said = scores.softmax(1).max(1)
    gap = (said == labels.to(said.device)).double() - confidence
    index = (confidence * bins).long().clamp(max=bins - 1)

    def error(kept: Tensor) -> Tensor:
        sums = torch.zeros(bins, dtype=gap.dtype, device=gap.device).index_add(0, index[kept], gap[kept])
        return sums.abs().sum() / len(kept)

    every = torch.arange(len(gap), device=gap.device)
    order = torch.randperm(len(gap), generator=torch.Generator().manual_seed(seed)).to(gap.device)
    groups = min(20, len(gap))
    left_out = torch.stack([error(order[order % groups != g]) for g in range(groups)]) if groups > 1 else None
    value = float(error(every))
    low, high, method = (
        (value, value, "one item") if left_out is None else jackknife_interval(value, left_out.cpu()).within(0, 1)
    )
    return Measurement(
        "expected calibration error",
        value,
        low,
        high,
        len(gap),
        higher_is_better=False,
        interval=method,
        note=f"{bins} bins",
    )


__all__ = ["expected_calibration_error"]
