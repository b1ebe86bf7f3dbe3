"""The algebra: states, contexts, beliefs, processes, denoisers, solvers and the one sampling loop."""

from sfumato.core.belief import KINDS, Coef, Posterior, row, solve
from sfumato.core.context import Context, Run, Tap
from sfumato.core.denoiser import Denoiser, Guidance, Wrapper, rebuild, tapped
from sfumato.core.errors import InputError, MissingExtra, SfumatoError, UnknownName
from sfumato.core.objective import Frozen, Loss, Objective
from sfumato.core.process import Kernel, Space
from sfumato.core.randomness import Streams, mix
from sfumato.core.registry import Registry
from sfumato.core.solver import Grid, Solver, Step, Wrap, check_steps, sample, trajectory
from sfumato.core.trees import State, Times, column, first, linear, tree_map

__all__ = [
    "KINDS", "Coef", "Context", "Denoiser", "Frozen", "Grid", "Guidance", "InputError",
    "Kernel", "Loss", "MissingExtra", "Objective", "Posterior", "Registry", "Run", "SfumatoError", "Solver", "Space",
    "State", "Step", "Streams", "Tap", "Times", "UnknownName", "Wrap", "Wrapper", "check_steps", "column", "first", "linear", "mix", "rebuild",
    "row", "sample", "solve", "tapped", "trajectory", "tree_map",
]  # fmt: skip
