"""Any network, what it predicts and which time label it knows: a Denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import KINDS, Coef, Context, Denoiser, InputError, Posterior, linear, tapped

ANCHOR = "anchor"


class Function(nn.Module):
    """A plain function ``(x, label, **cond) -> Tensor`` as a network without parameters."""

    forward: Callable[..., Tensor]

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function


class Parametrized(Denoiser):
    """See :func:`parametrized`."""

    def __init__(
        self,
        net: nn.Module | Callable[..., Tensor],
        process: Any,
        predicts: str = "eps",
        clock: Callable[[Any], Any] | None = None,
        null: Mapping[str, Any] | None = None,
        data_std: float = 0.5,
    ) -> None:
        super().__init__()
        if predicts not in (*KINDS, "edm"):
            raise InputError(f"predicts = {predicts!r}: use one of {', '.join((*KINDS, 'edm'))}")
        self.net = net if isinstance(net, nn.Module) else Function(net)
        self.process, self.predicts, self.clock = process, predicts, clock
        self.null, self.data_std = dict(null or {}), data_std
        self.reads, self.draws = _conditions(self.net), dict(getattr(net, "draws", {}))
        self._graph: list[Any] = []  # in a list, so that it is no second owner of the network's parameters

    def compiled(self, **options: Any) -> Parametrized:
        """The same denoiser on the same weights, its network called through ``torch.compile(net, **options)``.

        A call with taps runs the network as it stands, since a compiled graph has no place for them. The options are
        torch's: ``mode="reduce-overhead"`` replays CUDA graphs, ``dynamic=True`` keeps one graph for all batch sizes.
        """
        made = Parametrized(self.net, self.process, self.predicts, self.clock, self.null, self.data_std)
        made._graph = [torch.compile(self.net, **options)]
        return made.train(self.training)

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        coef = self.process.coef(t)
        net_in: Tensor = x
        kind: str | tuple[Any, Any] = self.predicts
        anchor = self.process.anchor(t, ctx.cond)
        if self.predicts == "edm":
            net_in, kind = linear(_edm_input(coef, self.data_std), x), edm_row(coef, self.data_std)
        net = self._graph[0] if self._graph and not ctx.taps else self.net
        inputs = {**self._conditions(ctx), **self._drawn(x, ctx)}
        try:
            with tapped(self.net, ctx):
                out = net(linear(1.0, net_in, 1.0, anchor), self._label(t, x), **inputs)
        except RuntimeError as error:
            self._same_type(x, error)
            raise
        if self.predicts == "flow" and anchor is not None:
            out = linear(1.0, out, -1.0, self.process.anchor(t, ctx.cond, derivative=True))
        ctx.run.nfe += len(x) / ctx.batch
        return Posterior(out, kind, x, coef)

    def _same_type(self, x: Tensor, error: RuntimeError) -> None:
        """InputError where the state and the network are of different types, which is likely why the call failed."""
        own = next((p.dtype for p in self.net.parameters() if p.is_floating_point()), x.dtype)
        if own != x.dtype:
            raise InputError(
                f"the state is {x.dtype} and the network {own}: give x in {own}, or move the denoiser with .to({x.dtype}) ({error})"
            ) from error

    def _label(self, t: Any, x: Tensor) -> Tensor:
        label = t if self.clock is None else self.clock(t)
        dtype = torch.promote_types(x.dtype, torch.float32)  # 999 is no bfloat16 number
        if isinstance(label, Tensor):
            return label.to(x.device, dtype if label.is_floating_point() else None)
        return torch.full((len(x),), label, dtype=dtype, device=x.device)

    def _conditions(self, ctx: Context) -> dict[str, Any]:
        if self.reads is None:
            return {k: v for k, v in ctx.cond.items() if k != ANCHOR}
        unread = set(ctx.cond) - self.reads - {ANCHOR}
        if unread:
            raise InputError(
                f"the network reads no condition {sorted(unread)}; it reads {sorted(self.reads) or 'none'}"
            )
        return {k: v for k, v in ctx.cond.items() if k in self.reads}

    def _drawn(self, x: Tensor, ctx: Context) -> dict[str, Tensor]:
        """Fresh noise for what the network wants drawn at each call and is not told: one draw an item, its rows alike."""
        missing = {name: shape for name, shape in self.draws.items() if name not in ctx.cond}
        if missing and ctx.rng is None:
            raise InputError(
                f"this network draws {', '.join(missing)} at each call: give a context with streams, Context.of(batch, seed)"
            )
        rows: Any = ctx.rng
        return {
            name: rows.normal(torch.empty(len(rows.seeds), *shape, dtype=x.dtype, device=x.device)).repeat(
                len(x) // len(rows.seeds), *[1] * len(shape)
            )
            for name, shape in missing.items()
        }


def _conditions(net: nn.Module) -> set[str] | None:
    """Names of the conditions a network reads: its ``accepts``, or its keyword arguments; None where it takes any."""
    if hasattr(net, "accepts"):
        return set(net.accepts)  # type: ignore[arg-type]
    parameters = list(inspect.signature(net.forward).parameters.values())
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if open_ended else {p.name for p in parameters[2:]}


def edm_row(c: Coef, data_std: float) -> tuple[Any, Any]:
    """The preconditioned network F of Karras et al. 2022 as a row: F = (sigma x0 / s - alpha s eps) / norm.

    With alpha = 1: D = c_skip x + c_out F, c_skip = s^2 / (sigma^2 + s^2), c_out = sigma s / sqrt(sigma^2 + s^2).
    """
    norm = (c.sigma**2 + (c.alpha * data_std) ** 2) ** 0.5
    return c.sigma / (data_std * norm), -c.alpha * data_std / norm


def _edm_input(c: Coef, data_std: float) -> Any:
    return 1.0 / (c.sigma**2 + (c.alpha * data_std) ** 2) ** 0.5


def parametrized(
    net: nn.Module | Callable[..., Tensor],
    process: Any,
    predicts: str = "eps",
    clock: Callable[[Any], Any] | None = None,
    null: Mapping[str, Any] | None = None,
    data_std: float = 0.5,
) -> Parametrized:
    """Wrap ``net(x, label, **cond) -> Tensor``, a module or a plain function, as a Denoiser.

    predicts  'eps' | 'x0' | 'v' | 'flow' | 'score' | 'edm' (the preconditioned network of Karras et al. 2022: its input
              is scaled to unit variance and its output is read as its row; ``data_std`` is the data's std)
    clock     t -> the time label the network was trained with (default: t itself), a number or a tensor (B,); the
              network gets (B,) in the dtype of x, but float32 at least
    null      what "no condition" is, by condition name

    A network with ``draws``, {condition: shape of an item}, is given fresh standard normal noise for those conditions at each
    call: its belief is then a draw from q(x0 | x_t) and not a mean, so a few large steps of 'ddpm', whose kernel is the
    posterior of the process, have many modes (Xiao, Kreis, Vahdat, 2022). Noise that is told, ``cond={"latent": z}``, stays.

    For an anchored process the network sees the raw state x_t (the anchor is added to its input here), and a 'flow'
    prediction has the anchor's drift taken off. torch.compile goes on ``net``: ``.compiled()``. Raises InputError for
    a condition that the network does not read.
    """
    return Parametrized(net, process, predicts, clock, null, data_std)
