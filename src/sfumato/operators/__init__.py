"""What was measured: y = A(x) + noise. A new file in this folder that registers an operator is all there is to adding one."""

from sfumato.operators._registry import get, names, register, registry
from sfumato.operators.base import Compose, Function, Operator, Stack, conjugate_gradient, stack
from sfumato.operators.fourier import Fourier, lines
from sfumato.operators.spatial import Blur, Downsample, Identity, Mask, Subsample

__all__ = [
    "Blur", "Compose", "Downsample", "Fourier", "Function", "Identity", "Mask", "Operator", "Stack", "Subsample",
    "conjugate_gradient", "get", "lines", "names", "register", "registry", "stack",
]  # fmt: skip
