"""Move, resize, drag, paste, and take over the looks of things: energies of the network's own features, region by region."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, Wrap, linear
from sfumato.denoisers.features import STACKS, features, network
from sfumato.editing.attention import Recorded, RecordKeys, Share, controlled, recorded
from sfumato.editing.base import Method, Task, register
from sfumato.editing.regions import Move, alike, centre_of, disc, fitted, mean_in, unlike
from sfumato.guidance.energies import Energetic, Term
from sfumato.solvers._once import Once
from sfumato.steering import follow

KINDS = {
    "move": frozenset({"mask"}),
    "drag": frozenset({"points"}),
    "appearance": frozenset({"mask", "reference"}),
    "paste": frozenset({"mask", "reference"}),
}


@dataclass(frozen=True)
class RegionalNoise(Wrap):
    """Between two shares of the run, inside a mask, the step of the process' own reverse kernel with noise ``eta`` in the
    place of the inner solver's: x <- m (mean + std z) + (1 - m) x.

    Elsewhere the inner step stays what it was to the last bit. Source: Mou et al., 2024, "DiffEditor".
    """

    inner: Solver
    mask: Tensor
    eta: float = 0.4
    begin: float = 0.2
    end: float = 0.4

    stochastic = True  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not (0 <= self.eta <= 1 and 0 <= self.begin <= self.end <= 1):
            raise InputError(
                f"eta = {self.eta}, begin = {self.begin}, end = {self.end}: eta from 0 to 1, and shares of the run in order"
            )

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        if not _within(ctx, self.begin, self.end):
            return self.inner.step(st, s, denoiser, ctx)
        process, once = denoiser.process, Once(denoiser)
        noise = ctx.draw(process.space, st.x)
        drawn = process.kernel(st.x, once(st.x, st.t, ctx), st.t, s, self.eta).draw(noise)
        there = self.inner.step(st, s, once, ctx)
        x: Any = there.x
        return replace(there, x=torch.where(self.mask.to(drawn) > 0.5, drawn, x))


@dataclass(frozen=True)
class TimeTravel(Wrap):
    """Between two shares of the run, before every second step: ``repeats`` times down to s and up to t again.

    back  the denoiser that is asked at s for the deterministic step up, x_t = alpha_t x0 + sigma_t eps

    Each repeat lets regions that were moved apart agree. Source: Mou et al., 2024, "DiffEditor"; Lugmayr et al., 2022.
    """

    inner: Solver
    back: Denoiser
    repeats: int = 3
    begin: float = 0.4
    end: float = 0.6

    def __post_init__(self) -> None:
        if self.repeats < 0 or not 0 <= self.begin <= self.end <= 1:
            raise InputError(
                f"repeats = {self.repeats}, begin = {self.begin}, end = {self.end}: a count, shares in order"
            )

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        c = denoiser.process.coef(st.t)
        if _within(ctx, self.begin, self.end) and ctx.run.step % 2 == 0 and s:
            for _ in range(self.repeats):
                low = self.inner.read(self.inner.step(st, s, denoiser, ctx))
                st = replace(st, x=self.back(low, s, ctx.fork("back")).at(c.alpha, c.sigma))
        return self.inner.step(st, s, denoiser, ctx)


def _within(ctx: Context, begin: float, end: float) -> bool:
    """Whether the step under way lies between these shares of the run."""
    return ctx.run.total is not None and begin <= ctx.run.step / ctx.run.total < end


@dataclass(frozen=True)
class Memory:
    """What the network held at every state of an inverted image: features by time and path, and keys and values."""

    states: Mapping[float, Tensor]
    features: Mapping[float, Mapping[str, Tensor]]
    keys: Mapping[Any, list[Tensor]]

    @staticmethod
    def of(task: Task, x0: Tensor, cond: Mapping[str, Any], paths: tuple[str, ...], keys: bool) -> Memory:
        """Invert x0, then ask once at each state."""
        run = task.trajectory(x0, denoiser=task.denoiser, cond=cond, start=0.0, stop=1.0)
        states: dict[float, Any] = {st.t: task.solver.read(st) for st in run}  # type: ignore[misc]
        ctx = task.context(cond)
        denoiser = controlled(task.denoiser, RecordKeys("self")) if keys else task.denoiser
        found = {t: features(denoiser, x, t, ctx, paths)[1] for t, x in states.items()}
        task.nfe[0] += ctx.run.nfe
        return Memory(states, found, recorded(ctx) if keys else {})

    @property
    def top(self) -> Tensor:
        """The state at the highest time."""
        return self.states[max(self.states)]


@dataclass(frozen=True)
class Plan:
    """An edit in masks at the size of the picture, (B, 1, H, W): what comes from where, and what stays.

    targets  (region, move, memory): the region shows what the move brings there
    area     the union of those regions; left: what the object leaves behind; stays: all else
    start    the state to begin with
    """

    targets: tuple[tuple[Tensor, Move, Memory], ...]
    area: Tensor
    left: Tensor
    stays: Tensor
    start: Tensor


@register("diffeditor")
@dataclass(frozen=True)
class DiffEditor(Method):
    """Invert the image, then draw it again while energies of decoder features say what is where.

    task        'move'        the object in ``mask`` by the one point (from -> to), resized by ``resize`` about its centre
                'drag'        what is around each point's start to its end (``mask``: where the picture may change)
                'appearance'  the object in ``mask`` takes the looks of what is in it in the ``reference``
                'paste'       the object in ``mask`` of the ``reference`` is put into the image, moved by the point if there is one
    edit, content, contrast, inpaint   weights of the energies: s = (1 + cosine) / 2 of features at the same time,
                edit / (1 + 4 s(target, object where it was)) + content / (1 + 4 s(rest, rest)) + contrast s(left, object)
                + inpaint / (1 + 4 s(mean of what is left, mean of the rest))
    scale       of all of them; limit: their largest push in units of eps (:func:`sfumato.guidance.energies`)
    regional    the first acts on the target region only, the others on the rest only; False: one gradient for all
    noise       of the reverse kernel in the edited region between 20 % and 40 % of the run; 0 for none
    repeats     time travel: between 40 % and 60 %, every second step is first gone down and up so many times
    bank        self-attention reads keys and values of the inverted image (for 'paste' and 'appearance' beside its own)
    copy        the inverted noise of the object is copied to its new place
    radius      of what is dragged around a point, a share of the picture
    paths       submodules whose outputs are the features; None: two stages of the decoder, or blocks of a transformer

    scale = noise = repeats = 0 without bank is the copy of latents alone; noise = repeats = 0 and regional=False is
    DragonDiffusion. Any solver that asks at the times of the grid. The image prompt of the paper is a trained adapter: a
    model that has one reads it as the condition ``image_prompt``, ``cond={"image_prompt": ...}``; no bundled model has.

    Source: Mou, Wang, Song, Shan, Zhang, 2024, "DiffEditor: Boosting Accuracy and Flexibility on Diffusion-based Image
    Editing"; the same, 2024, "DragonDiffusion: Enabling Drag-style Manipulation on Diffusion Models".
    """

    task: str = "move"
    resize: float = 1.0
    scale: float = 0.5
    limit: float = 1.0
    edit: float = 4.0
    content: float = 6.0
    contrast: float = 0.2
    inpaint: float = 0.8
    regional: bool = True
    noise: float = 0.4
    repeats: int = 3
    bank: bool = True
    copy: bool = True
    radius: float = 0.1
    paths: tuple[str, ...] | None = None
    factor: float = field(default=80.0, repr=False)  # the published step, 1000 times 0.08

    accepts = frozenset({"prompt", "source", "mask", "points"})

    def __post_init__(self) -> None:
        if self.task not in KINDS:
            raise InputError(f"task = {self.task!r}: one of {', '.join(KINDS)}")
        if not (self.resize > 0 and 0 < self.radius < 1):
            raise InputError(f"resize = {self.resize} and radius = {self.radius}: above 0, the radius below 1")
        if self.resize != 1 and self.task not in ("move", "paste"):
            raise InputError(f"resize = {self.resize} is for 'move' and 'paste', not {self.task!r}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What this task cannot do without: a move is said by a point or by a resize."""
        return KINDS[self.task] | ({"points"} if self.task == "move" and self.resize == 1 else frozenset())

    def __call__(self, task: Task) -> Tensor:
        cond = task.source if "source" in task.given else task.target
        paths = decoder_paths(network(task.denoiser)) if self.paths is None else self.paths
        own = Memory.of(task, task.x0, cond, paths, self.bank)
        other = None
        if "reference" in self.needs and task.reference is not None:
            other = Memory.of(task, task.reference, cond, paths, self.bank)
        plan = self.plan(task, own, own if other is None else other)
        denoiser = task.denoiser
        if self.bank:
            denoiser = controlled(denoiser, Share(joined=other is not None), source=Recorded(own.keys))
            if other is not None:
                denoiser = controlled(denoiser, Share(joined=True), source=Recorded(other.keys))
        guided = task.guidance(denoiser)
        if self.scale:
            terms = self.terms(plan, own, fitted(plan.area, task.x0))
            guided = Energetic(guided, terms, paths, task.denoiser, self.factor * self.scale, self.limit, 0.2, 0.6)
        solver: Solver = follow(task.solver)
        if self.noise:
            changes = fitted((plan.area + plan.left).clamp(max=1), task.x0)
            solver = RegionalNoise(solver, changes, self.noise)
        if self.repeats:
            solver = TimeTravel(solver, task.denoiser, self.repeats)
        return solver.read(task.run(plan.start, denoiser=guided, solver=solver))  # type: ignore[return-value]

    def plan(self, task: Task, own: Memory, other: Memory) -> Plan:
        """The masks, moves and the first state of this task."""
        size = (task.images.shape[-2], task.images.shape[-1])
        scale = torch.tensor([size[1], size[0]], dtype=torch.float32)
        moves = [(torch.tensor([u - x, v - y]) / scale, (u, v)) for x, y, u, v in task.points]
        mask = torch.zeros(len(task.x0), 1, *size) if task.mask is None else (task.mask > 0.5).float()
        if self.task == "drag":
            spots = [disc(to, self.radius * min(size), size).expand_as(mask) for _, to in moves]
            targets = tuple((spot, Move(by, torch.zeros(2)), own) for spot, (by, _) in zip(spots, moves, strict=True))
            area = torch.stack(spots).amax(0)
            may = torch.ones_like(mask) if task.mask is None else mask
            return Plan(
                targets, area, torch.zeros_like(mask), ((1 - area) * may if task.mask is None else 1 - may), own.top
            )
        if len(moves) > 1:
            raise InputError(f"{self.task!r} moves one thing: give one point, not {len(moves)}")
        by = moves[0][0] if moves else torch.zeros(2)
        move = Move(by, centre_of(mask), self.resize)
        if self.task == "appearance":
            return Plan(((mask, move, other),), mask, torch.zeros_like(mask), 1 - mask, own.top)
        there = (move(mask) > 0.5).float()
        if not (there.sum((1, 2, 3)) > 0).all():
            raise InputError(f"the move by {by.tolist()} (shares of the picture) takes the object out of it")
        left = mask * (1 - there) if self.task == "move" else torch.zeros_like(mask)
        start = own.top
        if self.copy:
            place = (fitted(there, start) > 0.5).to(start)
            start = linear(place, move(other.top, "nearest"), 1.0 - place, start)
        return Plan(((there, move, other),), there, left, (1 - there) * (1 - left), start)

    def terms(self, plan: Plan, own: Memory, area: Tensor) -> tuple[Term, Term]:
        """The energy of the edit and that of everything else, each with its region."""
        everywhere = torch.ones_like(area)
        edit = _averaged(self._looks if self.task == "appearance" else self._edit, plan, own)
        content = _averaged(self._content, plan, own)
        return (
            Term(edit, area if self.regional else everywhere),
            Term(content, 1 - area if self.regional else everywhere),
        )

    def _edit(self, plan: Plan, own: Memory, f: Tensor, at: Callable[[Memory], Tensor]) -> Tensor:
        """The regions of the plan look as the moved objects do, (B,)."""
        values = []
        for region, move, memory in plan.targets:
            inside = fitted(region, f)
            values.append(unlike(mean_in(alike(f, move(at(memory))), inside)[:, 0], inside))
        return self.edit * torch.stack(values).mean(0)

    def _looks(self, plan: Plan, own: Memory, f: Tensor, at: Callable[[Memory], Tensor]) -> Tensor:
        """The mean feature of the region is that of the reference, (B,)."""
        region, move, memory = plan.targets[0]
        inside = fitted(region, f)
        like = alike(mean_in(f, inside), mean_in(at(memory), inside))[:, 0]
        return self.edit * unlike(like, inside)

    def _content(self, plan: Plan, own: Memory, f: Tensor, at: Callable[[Memory], Tensor]) -> Tensor:
        """The rest stays, and what is left looks like the rest and not like the object, (B,)."""
        before, stays, left = at(own), fitted(plan.stays, f), fitted(plan.left, f)
        same = alike(f, before)
        fill = alike(mean_in(f, left), mean_in(before, stays))[:, 0]
        return (
            self.content * unlike(mean_in(same, stays)[:, 0], stays)
            + self.contrast * mean_in(same, left)[:, 0]
            + self.inpaint * unlike(fill, left)
        )


def _averaged(
    energy: Callable[..., Tensor], plan: Plan, own: Memory
) -> Callable[[Mapping[str, Tensor], float], Tensor]:
    """The mean over the features of an energy of one of them."""

    def of(found: Mapping[str, Tensor], t: float) -> Tensor:
        size = plan.area.shape[-2:]

        def at(path: str) -> Callable[[Memory], Tensor]:
            return lambda memory: _map(_known(memory, t)[path], (size[0], size[1]))

        values = [energy(plan, own, _map(h, (size[0], size[1])), at(path)) for path, h in found.items()]
        return torch.stack(values).mean(0)

    return of


def _known(memory: Memory, t: float) -> Mapping[str, Tensor]:
    """The features kept of this time."""
    if t not in memory.features:
        raise InputError(f"the image was not looked at at t = {t:.6g}: use a solver that asks at the times of the grid")
    return memory.features[t]


def _map(h: Tensor, size: tuple[int, int]) -> Tensor:
    """Features as maps (B, C, h, w): tokens (B, N, C) are put back in their places."""
    if h.ndim == 4:
        return h
    height = round((h.shape[1] * size[0] / size[1]) ** 0.5)
    if h.ndim != 3 or height * (h.shape[1] // height) != h.shape[1]:
        raise InputError(
            f"features {tuple(h.shape)} are no map: name a submodule that gives maps, or one token a patch"
        )
    return h.transpose(1, 2).unflatten(2, (height, -1))


def decoder_paths(net: nn.Module) -> tuple[str, ...]:
    """Two places where features say what is where: the decoder's finer half, or the second half of a transformer."""
    prefix = "model." if isinstance(getattr(net, "model", None), nn.Module) else ""
    inner: Any = net.get_submodule("model") if prefix else net
    levels = getattr(inner, "levels", None)
    if levels is not None and not prefix:
        return tuple("level" + ".deep" * i + ".up" for i in range(min(2, levels)))
    for stack, places in (("up_blocks", (0.25, 0.5)), *((name, (0.5, 0.75)) for name in STACKS)):
        blocks = getattr(inner, stack, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return tuple(dict.fromkeys(f"{prefix}{stack}.{int(share * len(blocks))}" for share in places))
    raise InputError(f"no decoder is known in a {type(net).__name__}: give paths=, submodules that give maps")


__all__ = ["DiffEditor", "Memory", "Plan", "RegionalNoise", "TimeTravel", "decoder_paths"]
