"""Sampler cards: what is saved samples as what was tuned, and only on the model it was tuned on."""

from __future__ import annotations

import json

import pytest
import torch

import sfumato as sf
from sfumato import codecs, conditioners, networks, oracles, processes
from sfumato.core import Context, InputError, sample
from sfumato.denoisers import parametrized
from sfumato.pipeline import Pipeline
from sfumato.solvers.empirical import DPMSolverV3, EmpiricalStatistics
from sfumato.solvers.scheduled import Move, Scheduled, Subspace
from sfumato.tuning.card import SamplerCard, described, fingerprint

MIXTURE = oracles.GaussianMixture([[-1.0, 0.4, 0.2], [0.8, -0.5, 0.1]], [0.3, 0.2])
DENOISER = MIXTURE.denoiser(processes.VP())
TIMES = (1.0, 0.6, 0.25, 0.0)
SOLVERS = {
    "spec": "dpm-solver++(order=3)",
    "scheduled": Scheduled((Move("v", "angle", 3, 0.9, 2), Move("noise"), Move()), free=True),
    "subspace": Subspace(TIMES, ((0.8, 0.1), (0.3, 0.2, -0.1), (0.1, 0.2, 0.3, 0.4)), "v"),
    "dpm-solver-v3": DPMSolverV3(EmpiricalStatistics.constant(0.9, -0.1, 0.2), order=3),
}


def card_of(solver, **fields) -> SamplerCard:
    description, tensors = described(solver)
    return SamplerCard(
        "test", description, 3, 3, times=TIMES, tensors=tensors, fingerprint=fingerprint(DENOISER), **fields
    )


def pipeline(bias: float = 0.0) -> Pipeline:
    torch.manual_seed(0)
    net = networks.UNet(1, width=8, multipliers=(1, 2), blocks=1, attention=False, embeddings={"y": 2})
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    net.output.bias.data += bias
    names = conditioners.Classes({"y": ["zero", "one"]})
    denoiser = parametrized(net.eval(), processes.VP(), "eps", null={"y": 2})
    return Pipeline(denoiser, codecs.Identity(1), names, (8, 8), steps=3, guidance=2.0)


def quick(p, **settings) -> SamplerCard:
    return sf.tune(p, 3, **{"items": 4, "unseen": 4, "fine": 8, "budget": 8, "rehearsals": 120, **settings})


@pytest.mark.parametrize("name", SOLVERS)
def test_a_saved_card_makes_the_same_sampler(tmp_path, name):
    ours = card_of(SOLVERS[name], guidance=2.0, seconds=1.5, rows=[{"a": 1.0}], skips=((), ("x",), ()))
    theirs = SamplerCard.load(ours.save(tmp_path / "deep" / "card.json"))
    assert theirs.record() == ours.record() and theirs.skips == ours.skips and theirs.times == TIMES
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = [sample(DENOISER, card.solver(), card.grid(), 3, x=x) for card in (ours, theirs)]
    assert torch.equal(*ends)
    assert (tmp_path / "deep" / "card.safetensors").exists() is (name in ("subspace", "dpm-solver-v3"))
    json.loads((tmp_path / "deep" / "card.json").read_text())


def test_another_model_is_refused_unless_asked_for():
    card = card_of(SOLVERS["scheduled"], guidance=2.0)
    card.check(DENOISER, 2.0)
    moved = oracles.GaussianMixture(MIXTURE.means + 1e-9, [0.3, 0.2])
    for other in (moved.denoiser(processes.VP()), MIXTURE.denoiser(processes.VP(beta_max=19.0))):
        with pytest.raises(InputError, match=r"another model.*fingerprint.*--force"):
            card.check(other)
        card.unchecked().check(other)
    with pytest.raises(InputError, match="tuned at guidance 2, not 3"):
        card.check(DENOISER, 3.0)


@pytest.mark.parametrize("damage", ["json", "kind", "field", "tensors", "missing"])
def test_a_damaged_card_is_one_clear_error(tmp_path, damage):
    path = card_of(SOLVERS["subspace"]).save(tmp_path / "card.json")
    record = json.loads(path.read_text())
    if damage == "json":
        path.write_text("{")
    elif damage == "kind":
        path.write_text(json.dumps(record | {"kind": "other"}))
    elif damage == "field":
        path.write_text(json.dumps({k: v for k, v in record.items() if k != "skips"}))
    elif damage == "tensors":
        path.with_suffix(".safetensors").write_bytes(b"nothing")
    else:
        path.with_suffix(".safetensors").unlink()
    with pytest.raises(InputError, match="damaged|no sampler card|copy both|cannot be read"):
        SamplerCard.load(path)
    with pytest.raises(FileNotFoundError, match="sfumato tune"):
        SamplerCard.load(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"a \.json file"):
        SamplerCard.load(tmp_path / "card.txt")


def test_tuning_improves_on_noise_that_was_never_used_and_is_deterministic():
    settings = {"shape": (3,), "items": 16, "unseen": 64, "fine": 48, "budget": 16, "rehearsals": 240}
    card, again = (sf.tune(DENOISER, 5, **settings) for _ in range(2))
    assert {**card.record(), "seconds": 0} == {**again.record(), "seconds": 0}
    assert torch.equal(card.tensors["rows"], again.tensors["rows"]) if card.tensors else not again.tensors
    rows = {r["method"]: r for r in card.rows}
    assert card.after["median"] < 0.6 * rows["untuned"]["median"] and card.nfe == card.after["nfe"] == 5
    assert len(set(card.seeds.values())) == 3 and card.after["n"] == 64 and card.seconds > 0
    ctx = Context.of(2, 0, dtype=torch.float64)
    sample(DENOISER, card.solver(), card.grid(), card.steps, shape=(2, 3), ctx=ctx)
    assert ctx.run.nfe == card.nfe


@pytest.mark.parametrize("method", ["untuned", "dpm-solver-v3", "usf", "olss", "subspace", "autodiffusion"])
def test_each_method_makes_a_card_that_the_pipeline_uses(tmp_path, method):
    p, news = pipeline(), []
    card = quick(p, method=method, told=news.append)
    assert card.made_by in (method, "default") and card.guidance == 2.0 and card.nfe <= 3
    path = card.save(tmp_path / "c.json")
    images = p.generate(["zero", "one"], sampler=path, seed=3)
    assert torch.equal(images, p.generate(["zero", "one"], sampler=card, seed=3, batch=1))
    ours = p.generate(["zero", "one"], steps=card.steps, solver=card.solver(), grid=card.grid(), seed=3)
    assert torch.equal(images, ours)
    assert {"stage", "done", "total", "best", "rows"} == set(news[0]) and news[-1]["stage"] == "done"


def test_wrong_requests_say_what_is_allowed(tmp_path):
    p = pipeline()
    card = quick(p, method="untuned")
    with pytest.raises(InputError, match="fingerprint"):
        pipeline(bias=0.1).generate(1, sampler=card)
    assert pipeline(bias=0.1).generate(1, sampler=card.unchecked()).shape == (1, 1, 8, 8)
    with pytest.raises(InputError, match="brings its own steps"):
        p.generate(1, sampler=card, steps=5)
    with pytest.raises(InputError, match="tuned at guidance"):
        p.generate(1, sampler=card, guidance=1.0)
    with pytest.raises(InputError, match="one of auto"):
        quick(p, method="best")
    with pytest.raises(InputError, match="fewer than the fine"):
        sf.tune(p, 64)
    for wrong in ({"items": 1}, {"unseen": 1}, {"budget": 0}, {"rehearsals": -1}):
        with pytest.raises(InputError, match="at least"):
            sf.tune(p, 5, **wrong)
    with pytest.raises(InputError, match="shape of one item"):
        sf.tune(DENOISER, 5)
    with pytest.raises(InputError, match="as a spec"):
        described(sf.solvers.get("heun"))
