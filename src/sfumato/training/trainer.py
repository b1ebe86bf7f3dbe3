"""The one training loop of the library."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, InputError, Loss, MissingExtra, Objective, Run, SfumatoError, Streams, mix
from sfumato.training import checkpoint, host, optim, parallel
from sfumato.training.ema import Average, Profiles, decays
from sfumato.training.monitor import Interruption, Metrics, Progress
from sfumato.training.options import PRECISIONS, Options, is_scalar, plain

log = logging.getLogger("sfumato")


class Diverged(SfumatoError, ArithmeticError):
    """The loss or the weights are not finite; the last checkpoint is kept."""


@dataclass(eq=False)
class Trainer(Options):
    """One loop over the turns of an objective, in one process or several.

    In turn k of iteration i the randomness is ``Streams.of(mix(seed, i, k), n)`` for the n items of the global batch, of
    which each process and each micro-batch takes its slice: one process, several, and any ``accumulate`` minimise the
    same numbers within rounding. ``torch.manual_seed`` is set a micro-batch (dropout layers). There is no data position
    and no random state to save, so a resumed training equals an uninterrupted one bit for bit.

    objective      what is minimised, and the players that minimise it
    data           i -> the global batch of iteration i, a mapping of tensors and lists with one entry an item. With
                   attributes ``size`` and ``part(i, lo, hi)`` only the slices are asked for. None: ``batch`` empty items
    steps          iterations in all
    out            folder of ``checkpoint.safetensors``, ``metrics.jsonl`` and ``profiles/``; None keeps nothing
    lr             learning rate, or one a player; ``warmup`` iterations up, ``decay='cosine'`` or ``'tail'`` down to 0 at the end
    optimizer      (player, parameters) -> Optimizer instead of AdamW(lr, betas, weight_decay)
    ema            decay of the averages that :meth:`fit` returns, or one a player; 0 keeps none
    profiles       widths of power-function averages, written to ``profiles/`` every ``snapshot_every`` iterations
    clip           largest gradient norm of a turn
    accumulate     micro-batches a batch
    precision      'no' | 'bf16' | 'fp16': autocast of the loss
    channels_last  memory order of images and convolutions
    on_sample      called with (averaged players, iteration) every ``sample_every`` iterations and at the end
    log_with       trackers of accelerate ('tensorboard', 'wandb', ...) beside metrics.jsonl
    config         JSON-able description of the run (network, data, ...); a resume with another one is refused
    progress       show the bar; None: if stderr is a terminal
    """

    objective: Objective
    data: Callable[[int], Mapping[str, Any]] | None

    def __post_init__(self) -> None:
        self.check()
        self.accelerator = _accelerator(self)
        self.device: torch.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.folder = None if self.out is None else Path(self.out)
        self.it, self.seconds = 0, 0.0
        self._amp = PRECISIONS[self.precision]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self._window: dict[str, list[Any]] = {}
        self._saved: int
        self._bad: Tensor | None
        self._images, self._spent = 0, 0.0
        self._interruption, self._stopping = Interruption(), False
        self._saved, self._bad = -1, None
        self.objective.to(self.device)
        if self.channels_last:
            self.objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        players = self.objective.players()
        if self.world > 1:
            parallel.from_first_rank([*self.objective.parameters(), *self.objective.buffers()])
        self._parameters = {k: [p for p in m.parameters() if p.requires_grad] for k, m in players.items()}
        for name, parameters in self._parameters.items():
            if not parameters:
                raise InputError(
                    f"player {name!r} has no parameter that requires a gradient: there is nothing to train"
                )
        rates = optim.rates(self.lr, list(players))
        make = {k: self.optimizer or optim.adamw(r, self.betas, self.weight_decay) for k, r in rates.items()}
        self._optimizers = {k: make[k](k, p) for k, p in self._parameters.items()}
        self._rates = {k: [g["lr"] for g in o.param_groups] for k, o in self._optimizers.items()}
        self._averages = {k: Average(self._parameters[k], d) for k, d in decays(self.ema, list(players)).items()}
        self._profiles = [Profiles(k, m, self.profiles) for k, m in players.items()] if self.profiles else []

    # ------------------------------------------------------------------ what a user calls

    def fit(self, resume: bool = True) -> dict[str, nn.Module]:
        """Train to ``steps`` and return copies of the players with averaged weights, in eval mode.

        ``resume`` continues from the checkpoint in ``out`` if there is one; ``resume=False`` refuses a folder that has
        one. Ctrl-C and SIGTERM wait for the iteration to end and for a checkpoint. Raises Diverged when the loss is not
        finite, CheckpointError when the disk is full, InputError when the checkpoint belongs to something else.
        """
        if self.path is not None and self.path.exists():
            if not resume:
                raise InputError(
                    f"{self.folder} holds a training: fit(resume=True) continues it, or choose another folder"
                )
            self.load()
        metrics = None if self.folder is None or self.rank else Metrics(self.folder / "metrics.jsonl")
        if metrics is not None:
            metrics.path.parent.mkdir(parents=True, exist_ok=True)
            metrics.rewind(self.it)
        self.objective.train()
        self._stopping = False
        devices = [self.device] if self.device.type == "cuda" else []
        show = self.progress if self.rank == 0 else False
        self._interruption = Interruption()
        bar = Progress(self.steps, self.it, show)
        with (
            host.fast(self.objective, self.device),
            torch.random.fork_rng(devices),
            self._interruption,
            bar,
            self._trackers(),
        ):
            while self.it < self.steps and not self._stopping:
                began = time.perf_counter()
                self._iterate()
                self._spent += time.perf_counter() - began
                self._after(metrics, bar)
            if self._stopping and self._saved != self.it:
                self.save()
        self.accelerator.wait_for_everyone()
        self._interruption.deliver()
        return self.averaged()

    @torch.no_grad()
    def averaged(self) -> dict[str, nn.Module]:
        """Copies of the players with averaged weights where an average is kept, in eval mode."""
        copies: dict[str, nn.Module] = copy.deepcopy(dict(self.objective.players()))
        for name, average in self._averages.items():
            trained = [p for p in copies[name].parameters() if p.requires_grad]
            for p, mean in zip(trained, average.tensors, strict=True):
                p.copy_(mean)
        return {name: module.eval() for name, module in copies.items()}

    @property
    def path(self) -> Path | None:
        """Where the checkpoint is."""
        return None if self.folder is None else self.folder / "checkpoint.safetensors"

    def save(self) -> None:
        """Write the checkpoint (rank 0). Raises Diverged rather than save weights that are not finite."""
        if self.path is None:
            return
        for name, parameters in self._parameters.items():
            if not all(bool(torch.isfinite(p).all()) for p in parameters):
                raise Diverged(f"the weights of {name!r} are not finite after iteration {self.it}: {self._advice()}")
        if self.rank == 0:
            checkpoint.write(self.path, self._state())
        self._saved = self.it

    def load(self) -> None:
        """Restore the checkpoint in ``out``. Raises InputError, with nothing changed, where it does not fit."""
        if self.path is None:
            raise InputError("this trainer has no folder: give out=")
        saved = checkpoint.read(self.path)
        self._fits(saved)
        self.objective.load_state_dict(saved["objective"])
        for name, optimizer in self._optimizers.items():
            optim.restore(optimizer, saved["optimizers"][name], name)
        for name, average in self._averages.items():
            average.load(saved["averages"][name])
        for profiles, tensors in zip(self._profiles, saved["profiles"], strict=True):
            for average, kept in zip(profiles.averages.values(), tensors, strict=True):
                average.load(kept)
        self._scaler.load_state_dict(saved["scaler"])
        self.it, self.seconds = saved["it"], saved["seconds"]
        self._window, self._images, self._spent = saved["window"], saved["images"], saved["spent"]
        self._saved = self.it

    # ------------------------------------------------------------------ one iteration

    def _iterate(self) -> None:
        it = self.it
        n, micro = self._batches(it)
        for turn, names in enumerate(self.objective.turns(it)):
            self._turn(turn, names, n, micro)
        for name, average in self._averages.items():
            average.update(self._parameters[name], it + 1)
        for profiles in self._profiles:
            for average in profiles.averages.values():
                average.update(self._parameters[profiles.player], it + 1)
        with torch.no_grad():
            self.objective.after_step(it)
        if self.world > 1:
            parallel.from_first_rank(self.objective.buffers())
        self._images += n
        self.it += 1

    def _batches(self, it: int) -> tuple[int, list[tuple[int, int, Any]]]:
        """(items of the global batch, [(lo, hi, items)]): the micro-batches of this rank, on its device."""
        by_part = self.data is not None and hasattr(self.data, "part")
        whole = {} if self.data is None or by_part else self.data(it)
        n = self.data.size if by_part else self.batch if self.data is None else parallel.count(whole)  # type: ignore[union-attr]
        if self.objective.couples and self.world * self.accumulate > 1:
            raise InputError(
                f"{type(self.objective).__name__} compares the items of a batch with each other, so a batch cannot be split: "
                "use accumulate=1 and one process"
            )
        if n < self.world * self.accumulate:
            raise InputError(
                f"the batch of iteration {it} has {n} items for {self.world} processes x {self.accumulate} micro-batches"
            )
        lo, hi = parallel.share(n, self.rank, self.world)
        mine = self.data.part(it, lo, hi) if by_part else parallel.take(whole, n, lo, hi)  # type: ignore[union-attr]
        mine = parallel.place(mine, self.device, self.channels_last)
        cuts = [parallel.share(hi - lo, k, self.accumulate) for k in range(self.accumulate)]
        return n, [(lo + a, lo + b, parallel.take(mine, hi - lo, a, b)) for a, b in cuts]

    def _turn(self, turn: int, names: Sequence[str], n: int, micro: Sequence[tuple[int, int, Any]]) -> None:
        """One loss of the players ``names``, and one step of their optimisers."""
        parameters = [p for name in names for p in self._parameters[name]]
        streams = Streams.of(mix(self.seed, self.it, turn), n)
        sums: dict[str, Tensor] = {}
        for lo, hi, items in micro:
            torch.manual_seed(mix(self.seed, self.it, turn, lo + 1))
            ctx = Context(
                cond=items.get("cond", {}),
                rng=streams.select(slice(lo, hi)),
                device=self.device,
                batch=hi - lo,
                run=Run(step=self.it, total=self.steps),
            )
            with torch.autocast(self.device.type, self._amp, enabled=self._amp is not None):
                loss: Loss = self.objective(items, ctx, names[0])
            share = (hi - lo) / n
            self._scaler.scale(loss.total * share).backward(inputs=parameters)
            for name, value in {"loss": loss.total, **loss.terms}.items():
                value = value.detach() * share
                sums[name] = sums[name] + value if name in sums else value
        sums = self._over_ranks(parameters, sums)
        self._finite(sums["loss"], names)
        if self.clip is not None:
            for name in names:
                self._scaler.unscale_(self._optimizers[name])
            sums["gradient_norm"] = nn.utils.clip_grad_norm_(parameters, self.clip)
        factor = optim.factor(self.it, self.steps, self.warmup, self.decay)
        for name in names:
            for group, rate in zip(self._optimizers[name].param_groups, self._rates[name], strict=True):
                group["lr"] = rate * factor
            self._scaler.step(self._optimizers[name])
            self._optimizers[name].zero_grad(set_to_none=True)
        if self._scaler.is_enabled():
            self._scaler.update()
        self._note(names[0], sums)

    def _over_ranks(self, parameters: Sequence[Tensor], sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients, figures and the wish to stop, summed over the processes."""
        if self.world == 1:
            self._stopping = bool(self._interruption.pending)
            return sums
        wish = torch.tensor(float(bool(self._interruption.pending)), device=self.device)
        *values, wish = parallel.sum_gradients(parameters, torch.stack([*(v.float() for v in sums.values()), wish]))
        self._stopping = self._stopping or bool(wish)
        return dict(zip(sums, values, strict=True))

    # ------------------------------------------------------------------ between iterations

    def _note(self, player: str, sums: Mapping[str, Tensor]) -> None:
        prefix = "" if len(self._parameters) == 1 else f"{player}/"
        for name, value in sums.items():
            total, count = self._window.get(prefix + name, (0.0, 0))
            self._window[prefix + name] = [total + value.double(), count + 1]

    def _finite(self, loss: Tensor, names: Sequence[str]) -> None:
        """Raise Diverged before the step on the CPU; elsewhere gather the doubt, and look when figures are read anyway."""
        where = f"the loss of {names[0]!r} is {{}} in iteration {self.it}: "
        if self.device.type == "cpu":
            if not bool(torch.isfinite(loss)):
                raise Diverged(where.format(float(loss)) + self._advice())
            return
        bad = ~torch.isfinite(loss)
        first = torch.full((), self.it, device=self.device)
        self._bad = (
            torch.where(bad, first, -1) if self._bad is None else torch.where((self._bad < 0) & bad, first, self._bad)
        )

    def _advice(self) -> str:
        kept = (
            f"the checkpoint of iteration {self._saved} is kept in {self.path}"
            if self._saved >= 0
            else "nothing was saved yet"
        )
        return f"{kept}; lower lr, add warmup= or clip=, or look for bad values in the data"

    def _after(self, metrics: Metrics | None, bar: Progress) -> None:
        """What is due after an iteration: figures, samples, snapshots, the checkpoint, in this order."""
        it, last = self.it, self.it == self.steps
        bar.at(it)
        due = it % self.log_every == 0 or last
        saving = it % self.save_every == 0 or last
        if (due or saving) and self._bad is not None and int(self._bad) >= 0:
            raise Diverged(f"the loss is not finite in iteration {int(self._bad)}: {self._advice()}")
        if due:
            row = self._row()
            bar.figures(next(v for k, v in row.items() if k.endswith("loss")), row["images_per_second"])
            if metrics is not None:
                metrics.write(row)
            if self.log_with:
                self.accelerator.log({k: v for k, v in row.items() if k != "it"}, step=it)
        if (
            self.on_sample is not None
            and self.rank == 0
            and (last or (self.sample_every and it % self.sample_every == 0))
        ):
            self.on_sample(self.averaged(), it)
        if self._profiles and self.folder is not None and self.rank == 0 and (last or it % self.snapshot_every == 0):
            for profiles in self._profiles:
                profiles.snapshot(self.folder / "profiles", it)
        if saving:
            self.save()

    def _row(self) -> dict[str, Any]:
        """One line of metrics.jsonl: means since the line before."""
        self.seconds += self._spent
        row: dict[str, Any] = {"it": self.it}
        row |= {name: float(total) / count for name, (total, count) in self._window.items()}
        rates = {k: o.param_groups[0]["lr"] for k, o in self._optimizers.items()}
        row |= {"lr": next(iter(rates.values()))} if len(rates) == 1 else {f"{k}/lr": v for k, v in rates.items()}
        row |= {"images_per_second": round(self._images / max(self._spent, 1e-9), 2), "seconds": round(self.seconds, 2)}
        self._window, self._images, self._spent = {}, 0, 0.0
        return row

    def _identity(self) -> dict[str, Any]:
        players = {k: sum(p.numel() for p in v) for k, v in self._parameters.items()}
        averages = {"ema": sorted(self._averages), "profiles": [float(w) for w in self.profiles]}
        return {"seed": self.seed, "parameters": players, **averages, "config": plain(self.config)}

    def _state(self) -> dict[str, Any]:
        """All that a resume needs. Teachers are Frozen, so they are not in the objective's state."""
        return {
            "it": self.it,
            "identity": self._identity(),
            "options": self.options(),
            "objective": self.objective.state_dict(),
            "optimizers": {k: optim.state(o) for k, o in self._optimizers.items()},
            "averages": {k: a.tensors for k, a in self._averages.items()},
            "profiles": [[a.tensors for a in p.averages.values()] for p in self._profiles],
            "scaler": self._scaler.state_dict(),
            "window": self._window,
            "images": self._images,
            "spent": self._spent,
            "seconds": self.seconds,
        }

    def _fits(self, saved: Mapping[str, Any]) -> None:
        missing = {"it", "identity", "objective", "optimizers"} - set(saved)
        if missing:
            raise InputError(f"{self.path} is no checkpoint of a training: it lacks {sorted(missing)}")
        if saved["it"] > self.steps:
            raise InputError(f"{self.path} is at iteration {saved['it']}, past steps = {self.steps}: raise steps")
        then, now = saved["identity"], self._identity()
        for key in now:
            if then.get(key) != now[key]:
                raise InputError(
                    f"{self.path} was made with {key} = {then.get(key)!r}, this training has {now[key]!r}: "
                    "use the same to resume, or another folder to start anew"
                )
        checkpoint.fit_shapes(f"{self.path}", saved["objective"], self.objective.state_dict())

    @contextmanager
    def _trackers(self) -> Iterator[None]:
        if self.log_with:
            self.accelerator.init_trackers("sfumato", config={k: v for k, v in self.options().items() if is_scalar(v)})
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers if self.log_with else ():
                tracker.finish()


def _accelerator(trainer: Trainer) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError:
        raise MissingExtra("accelerate", extra="train") from None
    return Accelerator(mixed_precision="no", cpu=trainer.cpu, log_with=trainer.log_with, project_dir=trainer.out)  # type: ignore[arg-type]
