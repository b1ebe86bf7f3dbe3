"""Several processes are one training: the same curve and the same weights within rounding, the same bits on every rank."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sfumato.core import InputError, Loss, Objective
from sfumato.denoisers import parametrized
from sfumato.objectives import ByLoss, Denoising
from sfumato.processes import VP
from sfumato.training import Trainer, launch, parallel


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(3, 16), nn.Linear(16, 2), nn.Linear(1, 1)
        self.embedding = nn.Embedding(4, 16)

    def forward(self, x, label, y):
        return self.last(torch.tanh(self.first(torch.cat([x, label[:, None]], 1)) + self.embedding(y)))


def data(it):
    g = torch.Generator().manual_seed(it)
    return {"x": torch.randn(13, 2, generator=g), "cond": {"y": torch.randint(0, 3, (13,), generator=g)}}


def trainer(out, seed=0, **options):
    torch.manual_seed(seed)
    denoiser = parametrized(Net(), VP(), "v", null={"y": 3})
    objective = Denoising(denoiser, times=ByLoss(8), dropout=0.2)
    more = {"log_every": 4, "save_every": 10, "clip": 0.5, "weight_decay": 0.1, "lr": 1e-3, "steps": 20}
    return Trainer(objective, data, out=out, cpu=True, **{**more, **options})


def fingerprint(run):
    state = [t.double().sum() for t in run.objective.state_dict().values()]
    return torch.stack(state + [t.double().sum() for a in run._averages.values() for t in a.tensors])


def check(folder):
    """Runs on every rank: train, compare the ranks bit for bit, resume, and refuse as one."""
    rank = int(os.environ["RANK"])
    run = trainer(folder + "/two", seed=rank)  # ranks that were built differently start from rank 0's weights
    run.fit()
    gathered = [torch.zeros_like(fingerprint(run)) for _ in range(2)]
    dist.all_gather(gathered, fingerprint(run))
    assert torch.equal(*gathered)
    split = trainer(folder + "/split", accumulate=3)
    split.fit()
    part = trainer(folder + "/part", steps=20)
    part.data = lambda it: data(it) if it < 13 else {"x": torch.full((13, 2), torch.nan), "cond": data(it)["cond"]}
    try:
        part.fit()
    except ArithmeticError as error:
        assert "nan in iteration 13: the checkpoint of iteration 10 is kept" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a nan was not seen on this rank")
    trainer(folder + "/part").fit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    os.environ["OMP_NUM_THREADS"] = "1"
    launch(check, 2, str(folder))
    run = trainer(folder / "one")
    run.fit()
    return folder, run


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


@pytest.mark.parametrize("name", ["two", "split"])
def test_two_processes_equal_one(runs, name):
    folder, run = runs
    for a, b in zip(lines(folder / "one"), lines(folder / name), strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    other = trainer(folder / name)
    other.load()
    for (key, a), b in zip(run.objective.state_dict().items(), other.objective.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6, msg=key)


def test_parameters_that_nobody_used_do_not_move_on_any_number_of_processes(runs):
    folder, _ = runs
    for name in ("one", "two"):
        run = trainer(folder / name)
        before = run.objective.denoiser.net.unused.weight.clone()
        run.load()
        assert torch.equal(run.objective.denoiser.net.unused.weight, before)  # weight decay does not apply to it either


def test_two_processes_resume_bit_for_bit(runs):
    folder, _ = runs
    one, other = trainer(folder / "two"), trainer(folder / "part")
    one.load(), other.load()
    for a, b in zip(one.objective.state_dict().values(), other.objective.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert lines(folder / "two") == lines(folder / "part")


@given(n=st.integers(0, 200), world=st.integers(1, 9))
def test_shares_cover_the_batch_and_differ_by_one(n, world):
    cuts = [parallel.share(n, rank, world) for rank in range(world)]
    assert [i for lo, hi in cuts for i in range(lo, hi)] == list(range(n))
    assert max(hi - lo for lo, hi in cuts) - min(hi - lo for lo, hi in cuts) <= 1


def failing():
    raise RuntimeError("rank fails")


def test_launch_passes_errors_on():
    with pytest.raises(RuntimeError, match="rank fails"):
        launch(failing, 1)
    with pytest.raises(InputError, match="processes = 0"):
        launch(failing, 0)


def test_one_process_needs_no_group():
    class One(Objective):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1)

        def players(self):
            return {"net": self.net}

        def forward(self, batch, ctx, player):
            return Loss(self.net.weight.sum())

    Trainer(One(), None, steps=1, cpu=True).fit()
    assert not dist.is_initialized()
