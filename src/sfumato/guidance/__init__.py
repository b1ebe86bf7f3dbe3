"""Denoiser to Denoiser: guidance composes by nesting, ``cfg(3.0)(other(denoiser))``."""

from sfumato.guidance.classifier_free import ClassifierFree, cfg

__all__ = ["ClassifierFree", "cfg"]
