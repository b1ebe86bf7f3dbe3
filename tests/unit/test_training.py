"""The training loop: turns, splitting, learning rates, errors, metrics."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sfumato.core import Context, Frozen, InputError, Loss, Objective, Run, Streams, mix
from sfumato.denoisers import parametrized
from sfumato.objectives import ByLoss, Denoising
from sfumato.processes import VP
from sfumato.training import Diverged, Trainer, optim


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x, label):
        return self.last(torch.tanh(self.first(torch.cat([x, label[:, None]], 1))))


def points(it, n=12):
    return {"x": torch.randn(n, 2, generator=torch.Generator().manual_seed(it))}


def trainer(out=None, data=points, times=None, seed=0, **options):
    torch.manual_seed(0)
    objective = Denoising(parametrized(Net(), VP(), "v"), weighting="min-snr", times=times)
    return Trainer(objective, data, out=out, seed=seed, cpu=True, **{"steps": 12, "lr": 1e-2, **options})


def weights(players):
    return torch.cat([p.detach().flatten() for m in players.values() for p in m.parameters()])


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


class Linear(Objective):
    """Minimises player . slope; the other losses of the tests derive from it."""

    def __init__(self, **slopes):
        super().__init__()
        self.nets = nn.ModuleDict({k: nn.Linear(1, 1, bias=False) for k in slopes})
        self.slopes = slopes
        for net in self.nets.values():
            nn.init.constant_(net.weight, 1.0)

    def players(self):
        return dict(self.nets)

    def forward(self, batch, ctx, player):
        return Loss(self.slopes[player] * self.nets[player].weight.sum())


def sgd(rate):
    return lambda player, parameters: torch.optim.SGD(parameters, rate)


# ------------------------------------------------------------------ the mathematics of a step


def test_a_step_is_the_gradient_of_the_mean_over_the_batch():
    """One SGD step against autograd on the whole batch, written out with the streams that the trainer documents."""
    run = trainer(steps=1, optimizer=sgd(0.1), ema=0, accumulate=3, seed=5)
    net = copy.deepcopy(run.objective)
    net(points(0), Context(rng=Streams.of(mix(5, 0, 0), 12), batch=12, run=Run()), "denoiser").total.backward()
    expected = [p.detach() - 0.1 * p.grad for p in net.parameters()]
    run.fit()
    for p, q in zip(run.objective.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-7)


@settings(max_examples=8, deadline=None)
@given(accumulate=st.integers(2, 12), n=st.integers(12, 20))
def test_accumulation_equals_one_big_batch(accumulate, n):
    one, split = (
        weights(trainer(data=lambda it: points(it, n), times=ByLoss(8), accumulate=k, optimizer=sgd(0.1)).fit())
        for k in (1, accumulate)
    )
    torch.testing.assert_close(one, split, rtol=1e-5, atol=1e-6)


def test_the_reported_loss_does_not_depend_on_accumulation(tmp_path):
    for k in (1, 5):
        trainer(tmp_path / str(k), accumulate=k, log_every=4).fit()
    for a, b in zip(lines(tmp_path / "1"), lines(tmp_path / "5"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_data_may_be_asked_for_parts():
    class Parts:
        size = 12

        def part(self, it, lo, hi):
            return {k: v[lo:hi] for k, v in points(it).items()}

    assert torch.equal(weights(trainer(data=Parts()).fit()), weights(trainer().fit()))


def test_no_gradient_lands_on_another_player():
    """Generator g minimises g d; its backward must not fill d's gradient, with any order of turns."""

    class Pair(Linear):
        def forward(self, batch, ctx, player):
            g, d = (self.nets[k].weight.sum() for k in ("g", "d"))
            return Loss(g * d if player == "g" else 3.0 * d)

    objective = Pair(g=1.0, d=1.0)
    players = Trainer(objective, None, steps=1, optimizer=sgd(0.1), ema=0, cpu=True).fit()
    assert players["g"].weight.item() == pytest.approx(1 - 0.1 * 1)
    assert players["d"].weight.item() == pytest.approx(1 - 0.1 * 3)  # and not 1 - 0.1 (3 + g)
    assert all(p.grad is None for p in objective.parameters())


def test_turns_choose_who_steps_and_who_shares_a_loss():
    class Turns(Linear):
        def turns(self, it):
            return [["a", "b"]] if it % 2 else [["c"], ["c"]]

        def forward(self, batch, ctx, player):
            assert ctx.run.step == self.seen
            return Loss(sum(self.nets[k].weight.sum() for k in (("a", "b") if player == "a" else ("c",))))

        seen = 0

        def after_step(self, it):
            assert it == self.seen and not torch.is_grad_enabled()
            self.seen += 1

    players = Trainer(Turns(a=1, b=1, c=1), None, steps=4, optimizer=sgd(0.1), ema=0, cpu=True).fit()
    assert [round(players[k].weight.item(), 6) for k in "abc"] == [0.8, 0.8, 0.6]


def test_items_have_their_own_streams_and_turns_their_own_noise():
    seen = {}

    class Watch(Linear):
        def turns(self, it):
            return [["a"], ["b"]]

        def forward(self, batch, ctx, player):
            seen.setdefault((ctx.run.step, player), []).append(ctx.rng.normal(batch["x"]))
            return super().forward(batch, ctx, player)

    for k in (1, 2, 4):
        Trainer(Watch(a=1, b=1), points, steps=2, accumulate=k, ema=0, cpu=True).fit()
    noises = []
    for draws in seen.values():
        whole = [torch.cat(part) for part in (draws[:1], draws[1:3], draws[3:])]
        assert torch.equal(whole[0], whole[1]) and torch.equal(whole[0], whole[2])
        noises.append(whole[0])
    rows = torch.stack(noises).flatten(0, 1)
    assert len(rows.unique(dim=0)) == len(rows)  # no two items, turns or iterations share noise


def test_dropout_layers_are_reproducible_and_the_callers_random_state_is_kept():
    class Dropped(Linear):
        def forward(self, batch, ctx, player):
            w = self.nets[player].weight.sum()
            return Loss((w * nn.functional.dropout(torch.ones(64), 0.5)).mean())

    ends = []
    for seed in (0, 0, 1):
        run = Trainer(Dropped(a=1), None, steps=5, optimizer=sgd(0.1), ema=0, cpu=True, seed=seed)
        torch.manual_seed(7)
        before = torch.get_rng_state()
        ends.append(run.fit()["a"].weight.item())
        assert torch.equal(torch.get_rng_state(), before)
    assert ends[0] == ends[1] != ends[2]


# ------------------------------------------------------------------ rates, clipping, averages


@given(steps=st.integers(1, 500), warmup=st.integers(0, 100), it=st.integers(0, 499))
def test_learning_rate_factor(steps, warmup, it):
    f = optim.factor(it, steps, warmup, "cosine")
    assert 0 <= f <= 1
    if it < warmup:
        assert f == (it + 1) / warmup and optim.factor(it, steps, warmup, None) == f
    elif it < steps:
        assert f == pytest.approx(math.cos(0.5 * math.pi * (it - warmup) / (steps - warmup)) ** 2)
        assert optim.factor(it, steps, warmup, None) == 1


def test_the_tail_falls_in_the_last_fifth_only():
    assert [optim.factor(it, 100, 0, "tail") for it in range(81)] == pytest.approx([1.0] * 81)
    assert [optim.factor(it, 100, 0, "tail") for it in (90, 95, 99)] == pytest.approx([0.5, 0.25, 0.05])


def test_each_player_has_its_rate_and_the_schedule_applies():
    schedule = {"steps": 6, "warmup": 2, "decay": "cosine", "ema": 0, "cpu": True}
    make = lambda player, parameters: torch.optim.SGD(parameters, {"a": 0.1, "b": 0.01}[player])  # noqa: E731
    players = Trainer(Linear(a=1, b=1), None, optimizer=make, **schedule).fit()
    travelled = sum(optim.factor(it, 6, 2, "cosine") for it in range(6))
    assert players["a"].weight.item() == pytest.approx(1 - 0.1 * travelled)
    assert players["b"].weight.item() == pytest.approx(1 - 0.01 * travelled)
    both = Trainer(Linear(a=1, b=1), None, steps=1, lr={"a": 0.1, "b": 0.01}, ema=0, cpu=True).fit()
    assert both["a"].weight.item() == pytest.approx(0.9, abs=1e-6) and both["b"].weight.item() == pytest.approx(
        0.99, abs=1e-6
    )


def test_clip_bounds_the_norm_of_a_turn():
    players = Trainer(Linear(a=100.0), None, steps=1, optimizer=sgd(1.0), clip=0.25, ema=0, cpu=True).fit()
    assert players["a"].weight.item() == pytest.approx(0.75, abs=1e-5)


def test_fit_returns_averages_and_leaves_the_live_weights():
    objective = Linear(a=1, b=1)
    players = Trainer(objective, None, steps=30, optimizer=sgd(0.1), ema={"a": 0.8}, cpu=True).fit()
    w, mean = 1.0, 1.0
    for n in range(1, 31):
        w -= 0.1
        decay = min(0.8, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * w
    assert objective.nets["a"].weight.item() == pytest.approx(w, abs=1e-5)
    assert players["a"].weight.item() == pytest.approx(mean, abs=1e-5)
    assert players["b"].weight.item() == pytest.approx(w, abs=1e-5) and not players["a"].training


# ------------------------------------------------------------------ what goes wrong


def spoiled(at):
    return lambda it: {"x": points(it)["x"] * (math.nan if it == at else 1)}


def test_a_loss_that_is_not_finite_is_one_error_and_nothing_is_lost(tmp_path):
    with pytest.raises(Diverged, match=r"nan in iteration 7: the checkpoint of iteration 6 is kept.*lower lr"):
        trainer(tmp_path, data=spoiled(7), save_every=3).fit()
    resumed = trainer(tmp_path, save_every=3).fit()
    assert torch.equal(weights(resumed), weights(trainer().fit()))


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Spoil(Linear):
        def after_step(self, it):
            if it == 3:
                self.nets["a"].weight.fill_(math.nan)

    with pytest.raises(Diverged, match="'a' are not finite after iteration 4: the checkpoint of iteration 2"):
        Trainer(Spoil(a=1), None, steps=9, out=tmp_path, save_every=2, cpu=True).fit()


@pytest.mark.parametrize(("options", "message"), [
    ({"steps": 0}, "steps = 0"),
    ({"accumulate": 0}, "accumulate = 0"),
    ({"precision": "fp8"}, "no, bf16, fp16"),
    ({"decay": "linear"}, "cosine"),
    ({"clip": 0.0}, "clip = 0.0"),
    ({"ema": 1.5}, "ema = 1.5"),
    ({"ema": {"student": 0.9}}, r"players are \['denoiser'\]"),
    ({"lr": {"student": 0.9}}, r"players are \['denoiser'\]"),
    ({"profiles": (0.5,)}, "sigma_rel = 0.5"),
])  # fmt: skip
def test_options_are_checked_at_once(options, message):
    with pytest.raises(InputError, match=message):
        trainer(**options)


@pytest.mark.parametrize(("data", "message"), [
    (lambda it: {}, "has 0 items"),
    (lambda it: {"x": torch.zeros(4, 2), "cond": {"y": torch.zeros(3)}}, r"batch\['cond'\]\['y'\] has 3 items, the batch has 4"),
    (lambda it: {"data": torch.zeros(4, 2)}, r"reads batch\['x'\]"),
    (lambda it: {"x": torch.zeros(4, 2, dtype=torch.uint8)}, "uint8"),
])  # fmt: skip
def test_wrong_batches_are_named(data, message):
    with pytest.raises(InputError, match=message):
        trainer(data=data).fit()


def test_a_batch_smaller_than_its_parts_is_refused():
    with pytest.raises(InputError, match="12 items for 1 processes x 13 micro-batches"):
        trainer(accumulate=13).fit()


def test_an_objective_that_couples_items_is_not_split():
    class Coupled(Linear):
        couples = True

    with pytest.raises(InputError, match="accumulate=1"):
        Trainer(Coupled(a=1), None, steps=1, batch=4, accumulate=2, cpu=True).fit()


def test_nothing_to_train():
    frozen = nn.Linear(1, 1).requires_grad_(False)

    class Idle(Objective):
        def players(self):
            return {"net": frozen}

    with pytest.raises(InputError, match="'net' has no parameter"):
        Trainer(Idle(), None, steps=1, cpu=True)


# ------------------------------------------------------------------ what it says


def test_metrics_are_means_over_the_interval(tmp_path):
    class Ramp(Linear):
        def forward(self, batch, ctx, player):
            value = torch.tensor(float(ctx.run.step))
            return Loss(0 * self.nets[player].weight.sum() + value, {"square": value**2})

    Trainer(Ramp(a=1), None, steps=7, out=tmp_path, log_every=3, warmup=4, lr=1.0, cpu=True).fit()
    rows = lines(tmp_path)
    assert [r["it"] for r in rows] == [3, 6, 7]
    assert [r["loss"] for r in rows] == [1.0, 4.0, 6.0] and [r["square"] for r in rows] == [
        pytest.approx(5 / 3),
        pytest.approx(50 / 3),
        36.0,
    ]
    assert [r["lr"] for r in rows] == [0.75, 1.0, 1.0]


def test_players_have_their_own_columns(tmp_path):
    Trainer(Linear(a=2.0, b=3.0), None, steps=1, out=tmp_path, lr={"a": 0.1, "b": 0.2}, cpu=True).fit()
    (row,) = lines(tmp_path)
    assert (row["a/loss"], row["b/loss"], row["a/lr"], row["b/lr"]) == (2.0, 3.0, 0.1, 0.2)


def test_samples_are_asked_for_with_averaged_players():
    seen = []

    def hook(players, it):
        seen.append(it)
        assert not players["denoiser"].training
        torch.randn(3)  # a hook that draws does not disturb the training

    drawn = weights(trainer(steps=7, on_sample=hook, sample_every=3).fit())
    assert seen == [3, 6, 7] and torch.equal(drawn, weights(trainer(steps=7).fit()))


def test_silent_without_a_terminal_and_a_bar_on_request(capfd):
    trainer(steps=2).fit()
    assert capfd.readouterr() == ("", "")
    trainer(steps=2, log_every=1, progress=True).fit()
    assert "images/s" in capfd.readouterr().err


def test_options_are_json(tmp_path):
    run = trainer(
        tmp_path, optimizer=sgd(0.1), on_sample=print, ema={"denoiser": 0.9}, config={"network": {"width": (1, 2)}}
    )
    options = run.options()
    assert json.loads(json.dumps(options)) == options and options["on_sample"] == "print" and options["steps"] == 12


# ------------------------------------------------------------------ interruption, precision, layout, teachers


def test_interruption_saves_and_then_interrupts(tmp_path):
    def interrupting(it):
        if it == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return points(it)

    run = trainer(tmp_path, data=interrupting)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert run.it == 6 and sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.equal(weights(trainer(tmp_path).fit()), weights(trainer().fit()))


def test_training_in_another_thread_leaves_signals_alone():
    found = []
    thread = threading.Thread(target=lambda: found.append(weights(trainer().fit())))
    thread.start(), thread.join()
    assert torch.equal(found[0], weights(trainer().fit()))


@pytest.mark.parametrize(("precision", "within"), [("bf16", 0.02), ("fp16", 0.002)])
def test_mixed_precision_stays_near_float32(precision, within):
    exact, mixed = (trainer(precision=p, optimizer=sgd(0.1)) for p in ("no", precision))
    if precision == "fp16":  # from a scale that does not overflow, so that no step is skipped
        mixed._scaler.load_state_dict({**mixed._scaler.state_dict(), "scale": 256.0})
    a, b = weights(exact.fit()), weights(mixed.fit())
    assert 0 < (a - b).abs().max() < within * a.abs().max()


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x, label):
        return self.net(x)


def test_channels_last_is_the_same_training(tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        objective = Denoising(parametrized(Conv(), VP(), "eps"))
        data = lambda it: {"x": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(it))}  # noqa: E731
        return Trainer(objective, data, lr=1e-3, out=folder, save_every=3, cpu=True, **options)

    plain = weights(run(None, steps=6).fit())
    last = run(tmp_path, steps=3, channels_last=True)
    last.fit()
    resumed = run(tmp_path, steps=6, channels_last=True)
    torch.testing.assert_close(weights(resumed.fit()), plain, rtol=1e-3, atol=1e-4)
    kernel = resumed.objective.denoiser.net.net[0].weight
    moment = resumed._optimizers["denoiser"].state[kernel]["exp_avg"]
    assert kernel.is_contiguous(memory_format=torch.channels_last) and moment.stride() == kernel.stride()


def test_teachers_are_not_saved(tmp_path):
    class Taught(Linear):
        def __init__(self):
            super().__init__(a=1)
            self.teacher = Frozen(nn.Linear(1000, 1000))

    run = Trainer(Taught(), None, steps=1, out=tmp_path, cpu=True)
    run.fit()
    assert run.path.stat().st_size < 10_000


def test_float16_scales_its_loss_and_resumes(tmp_path):
    """The gradient scaler is state: with a scale that overflows at first, steps are skipped until it has come down."""

    def run(out, steps):
        made = trainer(out, steps=steps, precision="fp16", optimizer=sgd(0.1), clip=1.0, save_every=3)
        if made.path is None or not made.path.exists():
            made._scaler.load_state_dict({**made._scaler.state_dict(), "scale": 2.0**40})
        return made

    whole = run(None, 40)
    start = weights({"denoiser": whole.objective.denoiser})
    end = weights(whole.fit())
    assert whole._scaler.get_scale() < 2.0**40 and not torch.equal(start, end)
    run(tmp_path, 9).fit()
    assert torch.equal(weights(run(tmp_path, 40).fit()), end)


def test_trackers_of_accelerate_see_what_is_logged():
    from accelerate.tracking import GeneralTracker

    class Book(GeneralTracker):
        name, requires_logging_directory, main_process_only = "book", False, True

        def __init__(self):
            super().__init__()
            self.rows, self.options, self.closed = [], {}, False

        @property
        def tracker(self):
            return self.rows

        def store_init_configuration(self, values):
            self.options = values

        def log(self, values, step=None, **more):
            self.rows.append((step, values))

        def finish(self):
            self.closed = True

    book = Book()
    trainer(steps=4, log_every=2, log_with=[book]).fit()
    assert [step for step, _ in book.rows] == [2, 4] and book.rows[0][1]["loss"] > 0
    assert book.options["steps"] == 4 and book.closed
