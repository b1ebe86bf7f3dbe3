"""Prompt-to-prompt: two coupled runs from one noise, the target's attention taken from the source's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn.functional import max_pool2d

from sfumato.core import Context, Denoiser, InputError, Solver, State, Step, Times, Wrap, linear
from sfumato.editing.attention import Control, Pair, Replace, Watch, controlled, watched
from sfumato.editing.base import Method, Task, register
from sfumato.editing.methods.basic import check_strength
from sfumato.editing.words import alignment, attention_map, changed


def controls(task: Task, cross: float = 0.8, structure: float = 0.4, start: float = 1.0) -> tuple[Control, ...]:
    """Word swap and refinement: cross-attention for the first share ``cross`` of the time from start to 0, aligned word by
    word, and self-attention for the first share ``structure``. A share of 0 is no control.
    """
    for name, share in (("cross", cross), ("structure", structure)):
        if not 0 <= share <= 1:
            raise InputError(f"{name} = {share}: a share of the run, from 0 to 1")
    out: list[Control] = []
    if cross:
        out.append(Replace("cross", stop=start * (1 - cross), align=alignment(task.source, task.target)))
    if structure:
        out.append(Replace("self", stop=start * (1 - structure)))
    return tuple(out)


def couple(
    task: Task,
    x: Tensor,
    controls: Sequence[Control],
    *,
    target: Tensor | None = None,
    solver: Solver | None = None,
    noise: Callable[[Context, Callable[[], State]], State] | None = None,
    start: float = 1.0,
    blend: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(source x0, target x0): both branches from t = start in one batch, the target's attention controlled by the source's.

    x, target  (n, *) the state each begins with; by default the same
    solver     acts on 2 n rows, ``Pair(n).split`` cuts them: wrap it to put the source rows where an inversion says
    noise      the Context's ``source``: recorded maps, as 2 n rows (``Pair(n).join(z, z)``)
    blend      threshold of :class:`LocalBlend`, 0 for none
    Both branches are guided by the task's guidance, each towards its own conditions.
    """
    pair = Pair(len(x))
    chosen = task.solver if solver is None else solver
    steered: Solver = chosen
    if blend:
        steered = LocalBlend(chosen, pair, *changed(task.source, task.target), threshold=blend)
        controls = (*controls, Watch(key=LocalBlend.key))
    denoiser = controlled(task.denoiser, *controls, source=pair) if controls else task.denoiser
    ctx = pair.context(task, source=noise)
    begun = pair.join(x, x if target is None else target)
    st = task.run(begun, denoiser=task.guidance(denoiser), solver=steered, start=start, ctx=ctx)
    return pair.split(steered.read(st))


@dataclass(frozen=True)
class LocalBlend(Wrap):
    """Outside where the words that differ are attended, the target's state is the source's: x <- s + m (x - s).

    m is 1 where the mean cross-attention so far to the source's or the target's changed words (n, L), spread over 3 x 3 and
    divided by its maximum, exceeds ``threshold``. Needs ``Watch(key=LocalBlend.key)`` around the denoiser. Source: Hertz et
    al., 2022, "Prompt-to-Prompt Image Editing with Cross Attention Control".
    """

    inner: Solver
    pair: Pair
    source: Tensor
    target: Tensor
    threshold: float = 0.3

    key = "attention.blend"

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold = {self.threshold}: between 0 and 1, the share of the strongest attention")

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        there = self.inner.step(st, s, denoiser, ctx)
        seen = watched(ctx, self.key)
        source, target = self.pair.split(there.x)
        if seen:
            sums = ctx.run.shared.setdefault(self.key + ".sums", [0.0, 0.0])
            halves = [[(path, p[i * self.pair.n :]) for path, p in seen] for i in (0, 1)]
            for i, words in enumerate((self.source, self.target)):
                sums[i] = sums[i] + attention_map(halves[i], words, target.shape[-2:]).detach()
        sums = ctx.run.shared.get(self.key + ".sums")
        if sums is None:
            return there
        mask = ((_spread(sums[0]) > self.threshold) | (_spread(sums[1]) > self.threshold)).to(target)
        return replace(there, x=self.pair.join(source, linear(mask, target, 1.0 - mask, source)))


def _spread(place: Tensor) -> Tensor:
    """(n, 1, H, W) spread over 3 x 3 and divided by its maximum; 0 where nothing is attended."""
    wide = max_pool2d(place, 3, 1, 1)
    return wide / wide.amax((-2, -1), keepdim=True).clamp(min=1e-12)


@register("prompt-to-prompt")
@dataclass(frozen=True)
class PromptToPrompt(Method):
    """The source is inverted by the deterministic solver and both branches run down together; the target attends as the
    source did, its new words as they please.

    cross      share of the run in which cross-attention is the source's (words that stay; swapped words take the place)
    structure  share in which self-attention is: more keeps more of the layout
    blend      threshold outside of which the picture is the source branch's (:class:`LocalBlend`), 0 for none
    strength   the time up to which the image is inverted

    cross = structure = blend = 0 is 'ddim-inversion'. As there the source branch drifts under guidance; 'direct-inversion'
    puts it back on its path. Source: Hertz, Mokady, Tenenbaum, Aberman, Pritch, Cohen-Or, 2022, "Prompt-to-Prompt Image
    Editing with Cross Attention Control".
    """

    cross: float = 0.8
    structure: float = 0.4
    blend: float = 0.0
    strength: float = 1.0

    needs = frozenset({"prompt", "source"})

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(self, task: Task) -> Tensor:
        up = task.run(task.x0, denoiser=task.denoiser, cond=task.source, start=0.0, stop=self.strength)
        acting = controls(task, self.cross, self.structure, self.strength)
        x: Any = task.solver.read(up)
        return couple(task, x, acting, start=self.strength, blend=self.blend)[1]
