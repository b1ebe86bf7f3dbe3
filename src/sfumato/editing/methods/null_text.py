"""Null-text optimisation: what guidance leads away from is fitted, step by step, until the picture comes back under guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError, Step, Wrapper
from sfumato.editing.base import Method, Task, register
from sfumato.editing.methods.basic import check_strength
from sfumato.editing.methods.direct_inversion import trail
from sfumato.editing.methods.prompt_to_prompt import controls, couple
from sfumato.guidance import ClassifierFree, negative

STARTS = ("null", "source")
Conditions = dict[str, Any]


class Nulls(Wrapper):
    """A guided denoiser led away from ``nulls[t]``, conditions (n, *) by name, in the step that leaves t.

    They stand in the place of the null as a negative prompt does; of k n rows each n are led away from the same.
    """

    def __init__(self, inner: Denoiser, nulls: Mapping[float, Mapping[str, Any]]) -> None:
        super().__init__(inner)
        self.nulls = nulls

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        begun: Any = ctx.run.t
        if begun not in self.nulls:
            raise InputError(f"no null was fitted for t = {begun}: fit and draw with the same grid and steps")
        own = self.nulls[begun]
        rows = {k: v.repeat(len(x) // len(v), *[1] * (v.ndim - 1)) for k, v in own.items()}
        return self.inner(x, t, ctx.fork(cond={**ctx.cond, **negative(rows)}))


@register("null-text")
@register("negative-prompt-inversion", iterations=0, begin="source", cross=0.0, structure=0.0)
@dataclass(frozen=True)
class NullText(Method):
    """DDIM inversion is stored, and the null of each step is fitted so that guidance under the source stays on it.

        null_t = argmin |x*_s - step(x_t | source, null_t)|^2    by Adam, from the null of the step before,

    x_t being where the fitted steps so far have led. The target is then drawn with these nulls, so its guidance starts from
    a run that gives the image back. Only numbers can be fitted (text features, pooled vectors), not classes.

    iterations    of Adam at each step; the best of them counts for each item, so no step ends farther off than with the null
                  that it began with
    rate          of Adam, falling linearly to half of it
    begin         'null': from the model's null; 'source': from what the picture shows, with iterations = 0
                  'negative-prompt-inversion': no fit at all, and under the source guidance has no effect
    cross, structure  attention control as in 'direct-inversion'; 0 and 0 need no attention that can be controlled
    strength      the time up to which the image is inverted

    Without guidance (scale 1) there is nothing to fit, and cross = structure = 0 is 'ddim-inversion'. Raises InputError for a
    guidance that has no null. Sources: Mokady, Hertz, Aberman, Pritch, Cohen-Or, 2023, "Null-text Inversion for Editing Real
    Images using Guided Diffusion Models"; Miyake, Iohara, Saito, Tanaka, 2023, "Negative-prompt Inversion".
    """

    iterations: int = 10
    rate: float = 0.01
    begin: str = "null"
    cross: float = 0.4
    structure: float = 0.6
    strength: float = 1.0

    needs = frozenset({"prompt", "source"})
    accepts = frozenset()

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.iterations < 0 or self.rate <= 0 or self.begin not in STARTS:
            raise InputError(
                f"iterations = {self.iterations} (0 or more), rate = {self.rate} (positive), begin = {self.begin!r} "
                f"(one of {', '.join(STARTS)})"
            )

    def __call__(self, task: Task) -> Tensor:
        stored = trail(task, self.strength)
        if task.scale != 1:
            task = task.but(guidance=_led(task.guidance, self.fitted(task, stored)))
        acting = controls(task, self.cross, self.structure, self.strength)
        x = stored[self.strength]
        if acting:
            return couple(task, x, acting, start=self.strength)[1]
        return task.solver.read(task.run(x, start=self.strength))  # type: ignore[return-value]

    def fitted(self, task: Task, stored: Mapping[float, Tensor]) -> dict[float, Conditions]:
        """The null of each step, by the time it leaves, along the states ``stored`` by time (:func:`trail`)."""
        if task.solver.stochastic:
            raise InputError(f"{task.solver} draws noise and cannot invert: give a deterministic solver")
        if not any(isinstance(m, ClassifierFree) for m in task.guided.modules()):
            raise InputError("this guidance leads away from no null: give a scale, or 'apg'")
        null, kept, out = self._begun(task), sorted(stored, reverse=True), dict[float, Conditions]()
        if not self.iterations:
            return dict.fromkeys(kept[:-1], null)
        st: Any = stored[self.strength]
        for i, s in enumerate(kept[1:]):
            null = self._fit(task, st, stored[s], null, self.rate * (1 - i / (2 * len(kept))))
            out[kept[i]] = null
            st = self._step(task, st, null)
        return out

    def _begun(self, task: Task) -> Conditions:
        """Rows (n, *) of the null, or of the source under the names that the null has."""
        found = {}
        for key, value in task.denoiser.null.items():
            if key in task.source:
                own = task.source[key]
                rows = torch.as_tensor(value, dtype=own.dtype, device=own.device).expand_as(own)
                found[key] = (own if self.begin == "source" else rows).clone()
        if self.iterations and not any(v.is_floating_point() for v in found.values()):
            raise InputError(
                f"the null of {sorted(found) or 'no conditions'} has no numbers that could be fitted: use "
                "'negative-prompt-inversion' or 'direct-inversion'"
            )
        return found

    def _fit(self, task: Task, st: Any, wanted: Tensor, null: Conditions, rate: float) -> Conditions:
        """The best null on the way from this one, item by item."""
        free = {k: v.clone().requires_grad_() for k, v in null.items() if v.is_floating_point()}
        adam, best = torch.optim.Adam(list(free.values()), lr=rate), dict(null)
        least = wanted.new_full((len(wanted),), torch.inf)
        for i in range(self.iterations + 1):
            there: Any = task.solver.read(self._step(task, st, null | free, grad=True))
            with torch.enable_grad():
                error = (there - wanted).square().flatten(1).mean(1)
                total = error.sum()
            better = error.detach() < least
            least = torch.where(better, error.detach(), least)
            for k, v in free.items():
                best[k] = torch.where(better.view(-1, *[1] * (v.ndim - 1)), v.detach(), best[k])
            if i == self.iterations or not total.requires_grad:  # outside an interval of guidance no null counts
                break
            slopes = torch.autograd.grad(total, list(free.values()), allow_unused=True)
            for v, slope in zip(free.values(), slopes, strict=True):
                v.grad = slope
            adam.step()
        return best

    def _step(self, task: Task, st: Any, null: Conditions, grad: bool = False) -> Step:
        """One step of the solver from a Step (or the state at the start) under the source, led away from the null."""
        ctx = task.context({**task.source, **negative(null)})
        return next(islice(task.trajectory(st, start=self.strength, ctx=ctx, grad=grad), 1, 2))


def _led(guidance: Guidance, nulls: Mapping[float, Conditions]) -> Guidance:
    """The guidance with its null conditions of each time."""
    return lambda denoiser: Nulls(guidance(denoiser), nulls)


__all__ = ["NullText", "Nulls"]
