"""Gradients through a whole sampling run: with respect to its start, its conditions and the weights.

>>> x0 = sf.gradients.sample(denoiser, steps=20, x=noise.requires_grad_(), method="checkpoint")
>>> loss(x0).backward()
"""

from sfumato.gradients._registry import get, names, register, registry
from sfumato.gradients.adjoint import Adjoint
from sfumato.gradients.checkpoint import Checkpoint
from sfumato.gradients.memory import Memory
from sfumato.gradients.sampling import Plain, sample

__all__ = ["Adjoint", "Checkpoint", "Memory", "Plain", "get", "names", "register", "registry", "sample"]
