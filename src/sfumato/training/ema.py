"""Averages of weights: exponential ones, and power-function profiles that can be chosen after the training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.core import InputError
from sfumato.training import checkpoint

Decay = Callable[[int], float]


def exponential(decay: float) -> Decay:
    """min(decay, (1 + n) / (10 + n)) after n steps: short trainings are not held back by where they began."""
    if not 0 <= decay < 1:
        raise InputError(f"ema = {decay}: a decay is in [0, 1), e.g. 0.999")
    return lambda n: min(decay, (1 + n) / (10 + n))


def power(sigma_rel: float) -> Decay:
    """(1 - 1/n)^(gamma + 1), which makes the average int_0^n theta(tau) tau^gamma dtau (gamma + 1) / n^(gamma + 1).

    ``sigma_rel`` is the width of that window relative to the length of the training so far.
    Source: Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, 2024, "Analyzing and Improving the Training Dynamics of
    Diffusion Models".
    """
    exponent = gamma(sigma_rel) + 1
    return lambda n: (1 - 1 / n) ** exponent


def gamma(sigma_rel: float) -> float:
    """The power of the profile of relative width sigma_rel = sqrt((g + 1) / ((g + 2)^2 (g + 3))), g >= 0.

    Raises InputError outside (0, 12^-1/2]; g = 0, the plain mean, has sigma_rel = 12^-1/2.
    """
    if not 0 < sigma_rel <= 12**-0.5 + 1e-12:
        raise InputError(f"sigma_rel = {sigma_rel}: it is in (0, 0.2887], e.g. 0.05 or 0.1")
    # sigma^-2 (g + 1) = (g + 2)^2 (g + 3), a cubic in g whose largest root is wanted
    s = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    real = roots.real[np.abs(roots.imag) < 1e-6 * (1 + np.abs(roots.real))]
    return max(0.0, float(real.max()))


class Average:
    """One running average of some tensors: avg <- avg + (1 - decay(n)) (now - avg) after step n = 1, 2, ..."""

    def __init__(self, parameters: Sequence[Tensor], decay: Decay) -> None:
        self.tensors = [p.detach().clone() for p in parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], n: int) -> None:
        """Take in the parameters after step n."""
        if self.tensors:
            torch._foreach_lerp_(self.tensors, [p.detach() for p in parameters], 1.0 - self.decay(n))

    @torch.no_grad()
    def load(self, tensors: Sequence[Tensor]) -> None:
        """Restore saved tensors, keeping device and memory layout."""
        for mine, theirs in zip(self.tensors, tensors, strict=True):
            mine.copy_(theirs)


class Profiles:
    """Power-function averages of one player, and their snapshots on the disk."""

    def __init__(self, player: str, module: nn.Module, widths: Sequence[float]) -> None:
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.player, self.names = player, list(named)
        self.averages = {float(w): Average(list(named.values()), power(w)) for w in widths}

    def snapshot(self, folder: Path, n: int) -> None:
        """Write every profile as it is after step n: ``PLAYER-WIDTH-STEP.safetensors``."""
        for width, average in self.averages.items():
            head = {"player": self.player, "sigma_rel": width, "step": n}
            tree = {**head, "weights": dict(zip(self.names, average.tensors, strict=True))}
            checkpoint.write(folder / f"{self.player}-{width:g}-{n:09d}.safetensors", tree)


def reconstruct(folder: str | Path, sigma_rel: float, *, player: str, step: int | None = None) -> dict[str, Tensor]:
    """The weights averaged with a profile of width ``sigma_rel`` that ends at ``step`` (default: the last snapshot's).

    Least squares in function space: with <a, b> the inner product of two profiles as functions of training time, the
    coefficients c of the snapshots solve A c = b, A_ij = <p_i, p_j>, b_i = <p_i, p>. The result is a mapping by parameter
    name for ``load_state_dict(..., strict=False)``. Snapshots later than ``step`` are not used.
    Raises InputError where there are no snapshots of that player. Source: Karras et al. 2024 (see :func:`power`).
    """
    found = sorted(Path(folder).glob(f"{player}-*.safetensors"))
    stored = [(p, *named) for p in found if (named := _named(p, player)) is not None]
    if not stored:
        raise InputError(
            f"no snapshots of {player!r} in {folder}: train with profiles=(0.05, 0.1) and snapshot_every=..."
        )
    step = max(s for *_, s in stored) if step is None else step
    stored = [entry for entry in stored if entry[2] <= step]
    if not stored:
        raise InputError(f"no snapshot of {player!r} up to step {step} in {folder}")
    profiles = [(float(s), gamma(w)) for _, w, s in stored]
    weights: dict[str, Tensor] = {}
    for (path, *_), c in zip(stored, coefficients(profiles, (float(step), gamma(sigma_rel))), strict=True):
        for name, value in checkpoint.read(path)["weights"].items():
            part = value.double() * c
            weights[name] = weights[name].add_(part) if name in weights else part
    return {name: value.float() for name, value in weights.items()}


def coefficients(stored: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> list[float]:
    """Least-squares coefficients that make profiles (end, gamma) add up to the wanted one."""
    a = np.array([[inner(p, q) for q in stored] for p in stored])
    b = np.array([inner(p, wanted) for p in stored])
    scale = 1 / np.sqrt(np.diag(a))
    solution = np.linalg.lstsq(a * scale[:, None] * scale, b * scale, rcond=None)[0]
    return [float(v) for v in solution * scale]


def inner(one: tuple[float, float], other: tuple[float, float]) -> float:
    """<p, q> = int p q for p(tau) = (g + 1) tau^g / T^(g + 1) on [0, T], with each profile given as (T, g)."""
    (ta, ga), (tb, gb) = one, other
    log = (ga + gb + 1) * math.log(min(ta, tb)) - (ga + 1) * math.log(ta) - (gb + 1) * math.log(tb)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * math.exp(log)


def _named(path: Path, player: str) -> tuple[float, int] | None:
    match = re.fullmatch(rf"{re.escape(player)}-([0-9.e-]+)-(\d+)\.safetensors", path.name)
    return (float(match[1]), int(match[2])) if match else None


def decays(ema: float | Mapping[str, float], players: Sequence[str]) -> dict[str, Decay]:
    """The decay of each player: one number is for all of them, a mapping for those it names; 0 keeps no average."""
    table = dict(ema) if isinstance(ema, Mapping) else dict.fromkeys(players, ema)
    if set(table) - set(players):
        raise InputError(f"ema names {sorted(set(table) - set(players))}; the players are {sorted(players)}")
    return {name: exponential(value) for name, value in table.items() if value}


__all__ = ["Average", "Decay", "Profiles", "coefficients", "decays", "exponential", "gamma", "power", "reconstruct"]
