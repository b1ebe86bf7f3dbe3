"""Checkpoints: written whole or not at all, and a resumed training equals an uninterrupted one bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from sfumato.core import InputError, Loss, Objective, linear
from sfumato.denoisers import parametrized
from sfumato.objectives import ByLoss, Denoising
from sfumato.processes import VP
from sfumato.training import CheckpointError, Trainer, checkpoint


class Net(nn.Module):
    """Dropout draws from the global generator, batch normalisation has buffers, and two names share one weight."""

    def __init__(self, width=32):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)
        self.middle = nn.Linear(width, width)
        self.again = nn.Linear(width, width)
        self.again.weight = self.middle.weight

    def forward(self, x, label):
        h = self.norm(torch.relu(self.first(torch.cat([x, label[:, None]], 1))))
        return self.last(nn.functional.dropout(torch.relu(self.again(torch.relu(self.middle(h)))), 0.1, self.training))


class Duel(Objective):
    """Two players, a target average and a counter of odd size: all that an objective can keep."""

    def __init__(self):
        super().__init__()
        self.denoising = Denoising(parametrized(Net(), VP(), "v"), weighting="min-snr", times=ByLoss(8))
        self.critic = nn.Linear(2, 1)
        self.register_buffer("target", torch.zeros(2, 3))
        self.register_buffer("queue", torch.zeros(0))

    def players(self):
        return {"denoiser": self.denoising.denoiser, "critic": self.critic}

    def turns(self, it):
        return [["denoiser"], ["critic"]] if it % 3 else [["critic"]]

    def forward(self, batch, ctx, player):
        if player == "denoiser":
            return self.denoising(batch, ctx)
        return Loss((self.critic(linear(1.0, batch["x"], 0.1, ctx.rng.normal(batch["x"]))) - 1).square().mean())

    def after_step(self, it):
        self.denoising.after_step(it)
        self.target.lerp_(self.critic.weight.repeat(2, 1)[:, [0, 1, 0]], 0.1)

    def get_extra_state(self):
        return {"length": float(self.target.sum()), "names": ["a", "b"]}

    def set_extra_state(self, state):
        assert state["names"] == ["a", "b"]


def data(it):
    return {"x": torch.randn(16, 2, generator=torch.Generator().manual_seed(it))}


def trainer(out, steps=60, **options):
    torch.manual_seed(0)
    more = {
        "save_every": 2,
        "log_every": 3,
        "profiles": (0.05, 0.1),
        "snapshot_every": 20,
        "warmup": 9,
        "decay": "cosine",
        "clip": 1.0,
    }
    return Trainer(
        Duel(), data, steps=steps, out=out, lr={"denoiser": 1e-2, "critic": 1e-3}, cpu=True, **{**more, **options}
    )


def tensors(path):
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def history(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def same_run(one, other):
    a, b = (tensors(folder / "checkpoint.safetensors") for folder in (one, other))
    assert set(a) == set(b) and len(a) > 40
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert history(one) == history(other)
    ours, theirs = (sorted((folder / "profiles").iterdir()) for folder in (one, other))
    assert [p.name for p in ours] == [p.name for p in theirs]
    assert all(torch.equal(x, tensors(q)[k]) for p, q in zip(ours, theirs, strict=True) for k, x in tensors(p).items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder).fit()
    return folder


def slow(it):
    time.sleep(0.004)
    return data(it)


def run_slowly(folder):
    torch.set_num_threads(1)
    run = trainer(folder)
    run.data = slow
    run.fit()


def test_killed_at_random_moments(tmp_path, whole):
    """SIGKILL, again and again, until a run gets through; checkpoints are written in half of the iterations."""
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["accelerate", "sfumato.training", __name__])
    moments, kills = random.Random(), 0
    for attempt in range(60):
        process = start.Process(target=run_slowly, args=(tmp_path,))
        process.start()
        if attempt == 0:
            while not (tmp_path / "checkpoint.safetensors").exists():
                time.sleep(0.01)
        process.join(moments.uniform(0.02, 0.3) if kills < 5 else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            break
    assert kills >= 3
    same_run(tmp_path, whole)


@settings(max_examples=8, deadline=None)
@given(at=st.integers(1, 59))
def test_resume_from_any_iteration(tmp_path_factory, whole, at):
    """A run that stopped after any iteration, between two log lines and snapshots too, continues as if it had not."""
    folder = tmp_path_factory.mktemp("part")
    first = trainer(folder, save_every=at)

    def stopping(it):
        if it == at:
            raise RuntimeError("stop")
        return data(it)

    first.data = stopping
    with pytest.raises(RuntimeError):
        first.fit()
    trainer(folder, save_every=60).fit()
    same_run(folder, whole)


def test_a_finished_training_is_returned_again(tmp_path):
    one, two = trainer(tmp_path).fit(), trainer(tmp_path).fit()
    assert all(torch.equal(p, q) for k in one for p, q in zip(one[k].parameters(), two[k].parameters(), strict=True))


def test_a_longer_training_continues_a_shorter_one(tmp_path):
    constant = {"decay": None, "log_every": 5, "snapshot_every": 5}
    trainer(tmp_path / "a", steps=10, **constant).fit()
    trainer(tmp_path / "a", steps=20, **constant).fit()
    trainer(tmp_path / "b", steps=20, **constant).fit()
    same_run(tmp_path / "a", tmp_path / "b")


def test_resume_false_does_not_overwrite(tmp_path):
    trainer(tmp_path, steps=2).fit()
    with pytest.raises(InputError, match="holds a training"):
        trainer(tmp_path, steps=2).fit(resume=False)


# ------------------------------------------------------------------ damaged and foreign files


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_checkpoint_is_one_clear_error(tmp_path, share):
    trainer(tmp_path, steps=4).fit()
    path = tmp_path / "checkpoint.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        InputError, match=r"checkpoint\.safetensors is not a readable checkpoint.*remove it to start anew"
    ):
        trainer(tmp_path, steps=8).fit()


@settings(max_examples=40, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_never_unpickles_or_crashes(tmp_path_factory, at, value):
    path = tmp_path_factory.getbasetemp() / "byte.safetensors"
    checkpoint.write(path, {"it": 3, "weights": {"a": torch.arange(4.0)}, "list": [1, None, "x", True]})
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] = value
    path.write_bytes(content)
    try:
        checkpoint.read(path)
    except InputError as error:
        assert "byte.safetensors" in str(error)


def test_another_network_another_seed_another_configuration(tmp_path):
    trainer(tmp_path, steps=2, config={"data": "a"}).fit()
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    for options, message in (
        ({"seed": 1}, "made with seed = 0, this training has 1"),
        ({"config": {"data": "b"}}, "config"),
        ({"ema": 0}, "ema"),
        ({"steps": 1}, "at iteration 2, past steps = 1"),
    ):
        with pytest.raises(InputError, match=message):
            trainer(tmp_path, **{"steps": 4, "config": {"data": "a"}, **options}).fit()
    wide = trainer(tmp_path, steps=4, config={"data": "a"})
    wide.objective.critic.weight = nn.Parameter(torch.zeros(2, 1))  # as many numbers, another shape
    with pytest.raises(InputError, match=r"critic\.weight is \(1, 2\) there and \(2, 1\) here"):
        wide.fit()
    renamed = trainer(tmp_path, steps=4, config={"data": "a"})
    renamed.objective.other = renamed.objective.critic
    with pytest.raises(InputError, match=r"lacks \['other\.bias', 'other\.weight'\]"):
        renamed.fit()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


# ------------------------------------------------------------------ writing


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, failing):
    run = trainer(tmp_path, steps=6, save_every=3, log_every=100)
    original = getattr(os, failing)

    def full(*args):
        if run.it == 6:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(os, failing, full)
    run._profiles = []
    with pytest.raises((CheckpointError, OSError), match="No space left"):
        run.fit()
    monkeypatch.undo()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert checkpoint.read(tmp_path / "checkpoint.safetensors")["it"] == 3


def test_a_file_size_limit_of_the_system_leaves_the_checkpoint_before(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.write(path, {"a": torch.zeros(10)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written .*the checkpoint before it is intact"):
            checkpoint.write(path, {"a": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(checkpoint.read(path)["a"], torch.zeros(10)) and [p.name for p in tmp_path.iterdir()] == [
        "c.safetensors"
    ]


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
)
shapes = st.lists(st.integers(0, 3), max_size=3).map(lambda s: torch.arange(float(torch.Size(s).numel())).reshape(s))
keys = st.one_of(st.text(max_size=4), st.integers(0, 99))
trees = st.recursive(
    leaves | shapes, lambda t: st.lists(t, max_size=3) | st.dictionaries(keys, t, max_size=3), max_leaves=12
)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@settings(max_examples=30, deadline=None)
@given(tree=trees)
def test_any_tree_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    checkpoint.write(path, tree)
    assert equal(checkpoint.read(path), tree)


def test_tied_weights_and_views_come_back(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tree = {"a": base, "same": base, "row": base[1], "turned": base.t(), "r/s": base[0], "r": {"s": base[:, 1]}}
    checkpoint.write(tmp_path / "t.safetensors", tree)
    assert equal(checkpoint.read(tmp_path / "t.safetensors"), tree)
    assert len(tensors(tmp_path / "t.safetensors")) == 5  # "same" is not stored again


def test_what_is_not_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="a/1 is a set"):
        checkpoint.write(tmp_path / "t.safetensors", {"a": [1, {2}]})
