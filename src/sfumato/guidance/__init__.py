"""Denoiser to Denoiser: guidance composes by nesting, ``cfg(3.0)(other(denoiser))``."""

from sfumato.guidance.classifier_free import ClassifierFree, cfg
from sfumato.guidance.measurement import Measured, measurement
from sfumato.guidance.threshold import Thresholded, threshold

__all__ = ["ClassifierFree", "Measured", "Thresholded", "cfg", "measurement", "threshold"]
