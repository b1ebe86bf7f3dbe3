"""Attention control: read, replace and mix what a network attends to, between two branches or two runs.

How to use it
-------------
Two branches (source, target) in one batched run, the usual case::

    pair = Pair(n)                                               # rows [source 0..n-1, target 0..n-1]
    denoiser = controlled(task.denoiser, Replace("cross", stop=0.2, align=alignment(task.source, task.target)),
                          Replace("self", stop=0.6), source=pair)
    st = task.run(pair.join(x_T, x_T), denoiser=task.guidance(denoiser), ctx=pair.context(task))
    source_x0, target_x0 = pair.split(task.solver.read(st))

or in one line ``couple(task, x_T, controls(task, cross=0.8, structure=0.4))`` -> (source_x0, target_x0), both of
:mod:`sfumato.editing.methods.prompt_to_prompt`. Whatever inverts the image brings x_T, and what else it knows: a steering
around ``solver`` that puts the source rows back on a stored trajectory (``pair.split`` / ``pair.join`` on ``Step.x``), or
``noise=`` for recorded noise maps.

Two runs, one after the other: ``controlled(denoiser, Record())`` in the first run, then
``controlled(denoiser, ..., source=Recorded(recorded(ctx)))`` with the first run's ctx in the second. What is recorded is
found again by the time of the call, so both runs visit the same times.

Controls are plain objects with a window: they act on calls at start >= t > stop (stop = 0 includes t = 0). Under
classifier-free guidance both readings are controlled alike. Nothing is kept on modules: a tap opens the fused kernel while
one call of one attention lasts, and what is recorded or watched lies in ``ctx.run.shared``.

Which networks
--------------
The DiT and U-Net of this library; of diffusers every ``Attention`` with a plain processor (``AttnProcessor2_0``, its fused
and its IP-Adapter form, whose text attention is controlled): UNet2DModel, UNet2DConditionModel (SD 1, 2, XL), PixArt, DiT.
Refused with an error: joint attention over text and image together (SD3, Flux), keys added to those of self-attention
(``AttnAddedKVProcessor``), linear attention, and processors that do not call ``scaled_dot_product_attention``. Attention
inside a ControlNet is left alone.

Sources: Hertz, Mokady, Tenenbaum, Aberman, Pritch, Cohen-Or, 2022, "Prompt-to-Prompt Image Editing with Cross Attention
Control"; Cao, Wang, Qi, Shan, Qie, Zheng, 2023, "MasaCtrl: Tuning-free Mutual Self-Attention Control".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, InputError, Wrapper
from sfumato.denoisers.features import network
from sfumato.editing.kernel import Opened, sites
from sfumato.editing.words import alignment, attention_map, changed, columns
from sfumato.networks.layers import Attention

BANK, VISITS = "attention.bank", "attention.visits"


@dataclass(frozen=True)
class At:
    """One call of one attention: its path, cross- or self-attention, the time, and which call at that time it is."""

    path: str
    cross: bool
    t: float
    visit: int
    ctx: Context

    @property
    def kind(self) -> str:
        """'cross' or 'self'."""
        return "cross" if self.cross else "self"


@dataclass(frozen=True)
class Control:
    """What is done to attention: ``control(at, own, source) -> new`` for values of one branch.

    on     'maps': the probabilities (R, heads, N, L) after the softmax
           'keys': keys and values before it, side by side: (R, heads, L, 2 d)
    kind   'cross', 'self', or None for both
    start, stop   acts at start >= t > stop (and at t = 0 where stop is 0)
    needs  it reads ``source``: what the other branch or run had there; otherwise ``source`` is ``own``
    alone  it is for all rows and not for the target's only
    """

    kind: str | None = None
    start: float = 1.0
    stop: float = 0.0

    on: ClassVar[str] = "maps"
    needs: ClassVar[bool] = False
    alone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.kind not in (None, "cross", "self"):
            raise InputError(f"kind = {self.kind!r}: 'cross', 'self' or None for both")
        if not 0 <= self.stop <= self.start <= 1:
            raise InputError(f"start = {self.start}, stop = {self.stop}: times with 1 >= start >= stop >= 0")

    def acts(self, at: At) -> bool:
        """Whether it acts on this call."""
        inside = self.stop < at.t <= self.start or at.t == self.stop == 0
        return inside and self.kind in (None, at.kind)

    def __call__(self, at: At, own: Tensor, source: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say what it does: write __call__(at, own, source)")


@dataclass(frozen=True)
class Replace(Control):
    """The target's probabilities are the source's.

    align  (n, L) from :func:`alignment`: target token j takes the map of source token align[:, j], and keeps its own where
           that is -1. None: token by token. For cross-attention only; rows are not normalised again, as published.

    With the source's own latents and conditions it changes nothing but rounding. Hertz et al. 2022: word swap, refinement,
    and (kind 'self') the injection of layout.
    """

    align: Tensor | None = field(default=None, compare=False)

    needs: ClassVar[bool] = True

    def __call__(self, at: At, own: Tensor, source: Tensor) -> Tensor:
        if not at.cross or self.align is None:
            if own.shape != source.shape:
                raise InputError(
                    f"maps {tuple(own.shape)} cannot be those of the source, {tuple(source.shape)}: align them"
                )
            return source
        index = columns(self.align, own, -1)
        taken = source.gather(-1, index.clamp(min=0).expand(own.shape))
        return torch.where(index >= 0, taken, own)


@dataclass(frozen=True)
class Reweight(Control):
    """The target's cross-attention to token j is multiplied by ``weights[:, j]``, (n, L) (Hertz et al. 2022)."""

    kind: str | None = "cross"
    weights: Tensor | None = field(default=None, compare=False)

    def __call__(self, at: At, own: Tensor, source: Tensor) -> Tensor:
        if self.weights is None:
            raise InputError("Reweight needs weights=, one a token (n, L)")
        return own * columns(self.weights.to(own), own, 1.0)


@dataclass(frozen=True)
class Share(Control):
    """The target attends to the source's keys and values (mutual self-attention, Cao et al. 2023; a memory bank).

    joined  to its own as well: the keys of both, side by side
    """

    kind: str | None = "self"
    joined: bool = False

    on: ClassVar[str] = "keys"
    needs: ClassVar[bool] = True

    def __call__(self, at: At, own: Tensor, source: Tensor) -> Tensor:
        return torch.cat([own, source], -2) if self.joined else source


@dataclass(frozen=True)
class Watch(Control):
    """Changes nothing; appends the probabilities of every call, with their graph, to a list that :func:`watched` takes."""

    kind: str | None = "cross"
    key: str = "attention.watched"

    alone: ClassVar[bool] = True

    def __call__(self, at: At, own: Tensor, source: Tensor) -> Tensor:
        at.ctx.run.shared.setdefault(self.key, []).append((at.path, own))
        return own


def watched(ctx: Context, key: str = "attention.watched") -> list[tuple[str, Tensor]]:
    """What :class:`Watch` saw since this was last asked, in call order: (path, probabilities (R, heads, N, L))."""
    return ctx.run.shared.pop(key, [])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Record(Control):
    """Changes nothing; keeps the probabilities for a second run (:class:`Recorded`)."""

    alone: ClassVar[bool] = True

    def __call__(self, at: At, own: Tensor, source: Tensor) -> Tensor:
        calls = at.ctx.run.shared.setdefault(BANK, {}).setdefault((self.on, at.path, at.t), [])
        calls.append(own.detach())
        return own


@dataclass(frozen=True)
class RecordKeys(Record):
    """Record for keys and values: what :class:`Share` needs in a second run."""

    on: ClassVar[str] = "keys"


def recorded(ctx: Context) -> Mapping[Any, list[Tensor]]:
    """The bank of a run that was recorded."""
    bank = ctx.run.shared.get(BANK)
    if not bank:
        raise InputError("nothing was recorded in this run: put controlled(denoiser, Record()) into it first")
    return bank  # type: ignore[no-any-return]


Edit = Callable[[Tensor, Tensor], Tensor]


class Source(Protocol):
    """Where the other side's values come from: ``source(at, what, value, edit)`` edits a value (R, *)."""

    def __call__(self, at: At, what: str, value: Tensor, edit: Edit) -> Tensor: ...


@dataclass(frozen=True)
class Pair:
    """Source and target as one batch: rows [source 0..n-1, target 0..n-1], once or (under guidance) several times."""

    n: int

    def __call__(self, at: At, what: str, value: Tensor, edit: Edit) -> Tensor:
        if len(value) % (2 * self.n):
            raise InputError(f"{len(value)} rows are not {self.n} pairs of source and target: use Pair(n).join")
        source, own = (v.flatten(0, 1) for v in value.unflatten(0, (-1, 2, self.n)).unbind(1))
        new = edit(own, source)
        if new.shape[-2] != source.shape[-2]:  # keys of both: twice the same ones mean what they meant once
            source = torch.cat([source, source], -2)
        return torch.stack([v.unflatten(0, (-1, self.n)) for v in (source, new)], 1).flatten(0, 2)

    def join(self, source: Any, target: Any) -> Any:
        """Rows, or conditions by name, of both branches as one batch."""
        if isinstance(source, Mapping):
            if source.keys() != target.keys():
                raise InputError(f"source and target have different conditions: {sorted(source)}, {sorted(target)}")
            return {k: self.join(v, target[k]) for k, v in source.items()}
        if not isinstance(source, Tensor):
            return source
        if source.shape != target.shape or len(source) != self.n:
            raise InputError(f"{tuple(source.shape)} and {tuple(target.shape)} are not {self.n} rows each of one shape")
        return torch.cat([source, target])

    def split(self, x: Any) -> tuple[Any, Any]:
        """(source rows, target rows)."""
        if isinstance(x, Mapping):
            return {k: v[: self.n] for k, v in x.items()}, {k: v[self.n :] for k, v in x.items()}
        return x[: self.n], x[self.n :]

    def context(self, task: Any, **fields: Any) -> Context:
        """The context of both branches of a Task: their conditions, and one stream an item, so both draw the same noise.

        A call counts twice: it has two rows an image.
        """
        ctx: Context = task.context(self.join(dict(task.source), dict(task.target)), **fields)
        if ctx.rng is not None:
            ctx.rng = ctx.rng.select([*range(self.n)] * 2)
        return ctx


@dataclass(frozen=True)
class Recorded:
    """The values of an earlier run, by path and time: ``Recorded(recorded(ctx))``.

    The k-th call at a time takes the k-th recorded there, going round. A run without guidance serves one with it: its rows
    are repeated.
    """

    bank: Mapping[Any, list[Tensor]] = field(repr=False)

    def __call__(self, at: At, what: str, value: Tensor, edit: Edit) -> Tensor:
        calls = self.bank.get((what, at.path, at.t))
        if not calls:
            there = sorted({t for _, path, t in self.bank if path == at.path})
            near = f"; there are t = {', '.join(f'{t:.4g}' for t in there[:8])}" if there else ""
            raise InputError(
                f"no {what} of {at.path!r} were recorded at t = {at.t:.6g}{near}: use the same grid and steps"
            )
        source = calls[at.visit % len(calls)]
        times, rest = divmod(len(value), len(source))
        if rest:
            raise InputError(f"{len(source)} rows were recorded, which do not fit {len(value)}")
        return edit(value, source.repeat(times, *[1] * (source.ndim - 1)))


class Controlled(Wrapper):
    """See :func:`controlled`."""

    def __init__(
        self, inner: Denoiser, controls: tuple[Control, ...], source: Source | None, where: str | None
    ) -> None:
        super().__init__(inner)
        lost = [type(c).__name__ for c in controls if c.needs and source is None]
        if lost:
            raise InputError(f"{', '.join(lost)} read another branch: give source=Pair(n) or source=Recorded(bank)")
        self.controls, self.source = controls, source
        self.sites = {k: m for k, m in sites(network(inner)).items() if where is None or where in k}
        if not self.sites:
            raise InputError(f"no attention has {where!r} in its path")

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        if not isinstance(t, (int, float)):
            raise InputError("attention is controlled by the time of a call: it needs one clock for the batch")
        live = [c for c in self.controls if c.start >= t >= c.stop]
        if not live:
            return self.inner(x, t, ctx)
        taps = [(path, functools.partial(self._around, path, module, float(t))) for path, module in self.sites.items()]
        return self.inner(x, t, ctx.fork(taps=taps))

    def _around(
        self, path: str, module: nn.Module, t: float, ctx: Context, call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The tap of one attention: its call, with what the controls of this time change."""
        name = "context" if isinstance(module, Attention) else "encoder_hidden_states"
        cross = (args[1] if len(args) > 1 else kwargs.get(name)) is not None
        visits = ctx.run.shared.setdefault(VISITS, {})
        visit = visits.get((path, t), 0)
        at = At(path, cross, t, visit, ctx)
        acting = [c for c in self.controls if c.acts(at)]
        visits[path, t] = visit + 1
        if not acting:
            return call(*args, **kwargs)
        if isinstance(module, Attention):
            kwargs["explicit"] = False  # the fused call is what is opened
        with Opened(functools.partial(self._edit, at, acting), any(c.on == "maps" for c in acting)) as opened:
            out = call(*args, **kwargs)
        if not opened.done:
            raise InputError(f"{path} does not call scaled_dot_product_attention: it cannot be controlled")
        return out

    def _edit(self, at: At, acting: list[Control], what: str, value: Tensor) -> Tensor:
        """Keys or maps after the controls that act on them."""
        for control in acting:
            if control.on != what:
                continue
            if control.alone or self.source is None:
                value = control(at, value, value)
            elif control.needs or isinstance(self.source, Pair):
                value = self.source(at, what, value, functools.partial(control, at))
            else:
                value = control(at, value, value)
        return value


def controlled(
    denoiser: Denoiser, *controls: Control, source: Source | None = None, where: str | None = None
) -> Controlled:
    """The denoiser with its attention under control; guidance goes around it: ``cfg(5.0)(controlled(...))``.

    controls  act in this order
    source    where the other side comes from: a Pair (two branches in this batch; the controls act on the target's rows),
              a Recorded bank of an earlier run, or None for controls that need none
    where     only attentions whose path contains this text

    Raises InputError for networks whose attention cannot be opened (see the module), and for a clock an item.
    """
    return Controlled(denoiser, controls, source, where)


__all__ = [
    "At", "Control", "Controlled", "Pair", "Record", "RecordKeys", "Recorded", "Replace", "Reweight", "Share", "Source",
    "Watch", "alignment", "attention_map", "changed", "controlled", "recorded", "sites", "watched",
]  # fmt: skip
