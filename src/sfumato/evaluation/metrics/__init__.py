"""Figures as pure functions of tensors: float64 inside, any float dtype and device outside, a Measurement each."""

from sfumato.evaluation.metrics.calibration import expected_calibration_error
from sfumato.evaluation.metrics.classifier import (
    CLASSIFIERS,
    classification_accuracy,
    classifier_two_sample,
    retrieval_accuracy,
    text_agreement,
)
from sfumato.evaluation.metrics.distances import (
    frechet_distance,
    frechet_from_moments,
    kernel_distance,
    median_distance,
    rbf_distance,
    sliced_wasserstein,
    wasserstein_1d,
)
from sfumato.evaluation.metrics.images import psnr, psnr_each, ssim, ssim_each
from sfumato.evaluation.metrics.manifold import (
    density_coverage,
    expected_coverage,
    memorisation_rate,
    memorisation_ratio,
    precision_recall,
)
from sfumato.evaluation.metrics.spectrum import detail_error, radial_power

__all__ = [
    "CLASSIFIERS", "classification_accuracy", "classifier_two_sample", "density_coverage", "detail_error", "expected_calibration_error",
    "expected_coverage",
    "frechet_distance", "frechet_from_moments", "kernel_distance", "median_distance", "memorisation_rate",
    "memorisation_ratio", "precision_recall", "psnr", "psnr_each", "radial_power", "rbf_distance", "retrieval_accuracy",
    "sliced_wasserstein", "ssim", "ssim_each", "text_agreement", "wasserstein_1d",
]  # fmt: skip
