"""Denoiser to Denoiser: guidance composes by nesting, ``cfg(3.0)(other(denoiser))``."""

from sfumato.guidance import rules
from sfumato.guidance._registry import get, names, register, registry
from sfumato.guidance.autoguidance import Autoguided, autoguidance
from sfumato.guidance.classifier import classifier, half_sine, smooth_activations
from sfumato.guidance.classifier_free import ClassifierFree, cfg, negative
from sfumato.guidance.dual import Dual, dual
from sfumato.guidance.flowchef import FlowChef, data_fit, flowchef
from sfumato.guidance.internal import Internal, internal
from sfumato.guidance.late_constraint import LateConstraint, late_constraint
from sfumato.guidance.loss import LossGuided, loss
from sfumato.guidance.measurement import Measured, measurement
from sfumato.guidance.perpendicular import PerpNeg, perp_neg
from sfumato.guidance.projected import Projected, apg
from sfumato.guidance.prompts import also, composed, interpolated, selected, selections
from sfumato.guidance.regional import Regional, box, regional, regions
from sfumato.guidance.rules import alternating, switched
from sfumato.guidance.superposition import Superposed, log_densities, superpose, superposition
from sfumato.guidance.threshold import Thresholded, threshold

__all__ = [
    "Autoguided", "ClassifierFree", "Dual", "FlowChef", "Internal", "LateConstraint", "LossGuided", "Measured", "PerpNeg", "Projected", "Regional", "Thresholded",
    "apg", "autoguidance", "box", "cfg", "classifier", "data_fit", "dual", "flowchef", "get", "half_sine", "internal", "late_constraint", "loss", "measurement", "names", "negative", "perp_neg", "regional",
    "regions", "register", "registry", "smooth_activations", "threshold",
    "Superposed", "also", "alternating", "composed", "interpolated", "log_densities", "rules", "selected", "selections", "superpose",
    "superposition", "switched",
]  # fmt: skip
