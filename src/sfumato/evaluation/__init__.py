"""How good samples are: figures with intervals on named features, never a bare number."""

from sfumato.evaluation import features, metrics
from sfumato.evaluation.evaluate import METRICS, FeatureSets, evaluate, evaluate_pairs
from sfumato.evaluation.extraction import batches, extract
from sfumato.evaluation.features import EXTRACTORS, NetworkFeatures, PCAFeatures, PixelFeatures
from sfumato.evaluation.grid import grid
from sfumato.evaluation.measurement import (
    Interval,
    Measurement,
    bootstrap_interval,
    jackknife_interval,
    median_interval,
    student_interval,
    wilson_interval,
)
from sfumato.evaluation.metrics.calibration import expected_calibration_error
from sfumato.evaluation.table import Table

__all__ = [
    "EXTRACTORS", "METRICS", "FeatureSets", "Interval", "Measurement", "NetworkFeatures", "PCAFeatures",
    "PixelFeatures", "Table", "batches", "bootstrap_interval", "evaluate", "evaluate_pairs", "expected_calibration_error", "extract", "features",
    "grid", "jackknife_interval", "median_interval", "metrics", "student_interval", "wilson_interval",
]  # fmt: skip
