"""A few-step student of a pipeline, taught by the pipeline alone: ``sf.distill``."""

from sfumato.distillation.front import distill
from sfumato.distillation.job import Job, rewrapped
from sfumato.distillation.methods import METHODS
from sfumato.distillation.settings import Settings

__all__ = ["METHODS", "Job", "Settings", "distill", "rewrapped"]
