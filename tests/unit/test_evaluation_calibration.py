"""Calibration error against torchmetrics and against classifiers whose calibration is known."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from sfumato.core import InputError
from sfumato.evaluation.metrics.calibration import expected_calibration_error


@pytest.mark.parametrize("bins", [5, 15])
def test_it_is_what_torchmetrics_says(bins):
    generator = torch.Generator().manual_seed(0)
    logits, labels = 2 * torch.randn(500, 7, generator=generator), torch.randint(7, (500,), generator=generator)
    found = expected_calibration_error(logits, labels, bins=bins)
    theirs = multiclass_calibration_error(logits.softmax(1), labels, num_classes=7, n_bins=bins, norm="l1")
    assert abs(found.value - float(theirs)) < 1e-5
    assert found.low <= found.value <= found.high and found.n == 500


def test_labels_drawn_from_the_probabilities_are_calibrated_and_a_temperature_breaks_that():
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(20000, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert expected_calibration_error(logits, labels).value < 0.02
    assert expected_calibration_error(4 * logits, labels).value > 0.15


def test_wrong_shapes_are_refused():
    with pytest.raises(InputError, match="labels"):
        expected_calibration_error(torch.randn(3, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(InputError, match="bins"):
        expected_calibration_error(torch.randn(3, 2), torch.zeros(3, dtype=torch.long), bins=0)
