"""Distillation: objectives that teach a few-step student from a teacher."""

from sfumato.objectives.distill.adversarial import DenoisingGAN
from sfumato.objectives.distill.bootstrap import Bootstrap
from sfumato.objectives.distill.consistency import Consistency
from sfumato.objectives.distill.matching import DistributionMatching
from sfumato.objectives.distill.moments import SamplerMMD, squared_mmd
from sfumato.objectives.distill.segments import Segments, matched
from sfumato.objectives.distill.slimflow import AnnealingReflow, FlowGuided
from sfumato.objectives.distill.timeaware import TimeAware
from sfumato.objectives.distill.unrolled import Unrolled

__all__ = [
    "AnnealingReflow",
    "Bootstrap",
    "Consistency",
    "DenoisingGAN",
    "DistributionMatching",
    "FlowGuided",
    "SamplerMMD",
    "Segments",
    "TimeAware",
    "Unrolled",
    "matched",
    "squared_mmd",
]
