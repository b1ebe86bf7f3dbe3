"""A condition read off a frozen network's features: learning it, and steering by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfumato as sf
from sfumato import oracles
from sfumato.core import Context, InputError
from sfumato.denoisers import parametrized
from sfumato.denoisers.features import features
from sfumato.guidance import cfg
from sfumato.guidance.late_constraint import late_constraint
from sfumato.networks import UNet
from sfumato.networks.aligner import ConditionAligner, square
from sfumato.objectives.alignment import ConditionAlignment, aligner_for, read
from sfumato.objectives.times import Uniform
from sfumato.processes import EDM, VP, Flow
from sfumato.training import Trainer

SIZE, PATHS = 8, ("level.deep", "level.deep.deep")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model(process: Any = None, predicts: str = "v", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    net = (
        UNet(1, width=8, multipliers=(1, 2), blocks=1, attention=(False, True), heads=2, embeddings={"y": 2})
        .to(dtype)
        .eval()
    )
    for i, p in enumerate(net.parameters()):
        p.data = p.data if bool(p.any()) else 0.1 * noise(*p.shape, seed=i, dtype=dtype)
    return parametrized(net, process or VP(), predicts, null={"y": 2})


def aligner(denoiser: Any, dtype: torch.dtype = torch.float64, paths: tuple[str, ...] = PATHS) -> Any:
    torch.manual_seed(1)
    x, target = torch.zeros(1, 1, SIZE, SIZE, dtype=dtype), torch.zeros(1, 2, SIZE, SIZE)
    return aligner_for(denoiser, paths, x, target, widths=(8,)).to(dtype).eval()


def ctx(n: int, **fields: Any) -> Context:
    return Context.of(n, None, **fields)


# ------------------------------------------------------------------ the step


@pytest.mark.parametrize("t", [0.6, 0.9])
def test_the_step_is_the_published_one_in_eps(t: float):
    denoiser, x, target = model(), noise(2, 1, SIZE, SIZE), noise(2, 2, SIZE, SIZE, seed=5)
    learned = aligner(denoiser)
    guided = late_constraint(learned, target, PATHS, scale=1.7)(denoiser)(x, t, ctx(2))
    plain = denoiser(x, t, ctx(2)).view("eps").detach()
    for i in range(2):
        at = x[i : i + 1].clone().requires_grad_()
        found = features(denoiser, at, t, ctx(1), PATHS)[1]
        said = learned([found[p] for p in PATHS], torch.full((1,), t, dtype=torch.float64))
        (g,) = torch.autograd.grad((said - target[i : i + 1]).square().mean(), at)
        wanted = plain[i] + 1.7 * (plain[i] - x[i]).norm() / g.norm() * g[0]
        assert torch.allclose(guided.view("eps")[i], wanted, atol=1e-9)
    assert torch.equal(guided.x, x) and not guided.native.requires_grad


def test_it_lowers_what_it_says_it_lowers_on_an_exact_belief():
    """Features of an exact denoiser: the aligner reads x0 itself, so the sample should become the target."""
    mixture = oracles.GaussianMixture(2 * noise(6, 4), torch.full((6,), 0.3), torch.full((6,), 1 / 6)).denoiser(VP())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.oracle = nn.Identity(), mixture

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return self.seen(self.oracle(x, float(label[0]), Context.of(len(x), None)).view("v"))

    denoiser = parametrized(Net(), VP(), "v")
    target = noise(6, 4)[:1].double().view(1, 4) * 2

    def reader(found: Any, label: Tensor) -> Tensor:  # x0 = alpha x - sigma v is not in v alone: compare v's with v's
        return found[0]

    x, t = noise(8, 4, seed=3), 0.6
    wanted = target.expand(8, -1)
    guided = late_constraint(reader, wanted, ("seen",), scale=0.05, until=0.1)(denoiser)
    before = (denoiser(x, t, ctx(8)).view("v") - wanted).square().mean(1)
    post = guided(x, t, ctx(8))
    near = denoiser.process.coef(t).alpha * post.mean + denoiser.process.coef(t).sigma * denoiser(x, t, ctx(8)).view(
        "eps"
    )
    after = (denoiser(near, t, ctx(8)).view("v") - wanted).square().mean(1)
    assert bool((after <= before + 1e-12).all()) and float(after.mean()) < float(before.mean())


@pytest.mark.parametrize("process", [VP(), Flow(), EDM()], ids=["vp", "flow", "edm"])
def test_a_belief_does_not_depend_on_the_scale_of_the_state(process: Any):
    """The same x0, told through any Gaussian process, is moved alike: the norm is taken at variance one."""
    from sfumato.core import Posterior
    from sfumato.guidance.late_constraint import LateConstraint

    x0, eps, slope = noise(2, 6), noise(2, 6, seed=1), noise(2, 6, seed=2)
    ratio = 1.5
    t = process.time(-float(torch.tensor(ratio).log()))
    c = process.coef(t)
    post = Posterior(x0, "x0", c.alpha * x0 + c.sigma * eps, c)
    a, s = 1 / (1 + ratio**2) ** 0.5, ratio / (1 + ratio**2) ** 0.5
    state = a * x0 + s * eps
    wanted = s / a * (eps - state).norm(dim=1, keepdim=True) * slope / slope.norm(dim=1, keepdim=True)
    assert torch.allclose(LateConstraint.step(post, slope), wanted, atol=1e-9)


def test_pure_noise_and_no_slope_are_legal():
    process = sf.processes.Cosine()
    denoiser, x = model(process), noise(2, 1, SIZE, SIZE)
    post = late_constraint(aligner(denoiser), noise(1, 2, SIZE, SIZE), PATHS)(denoiser)(x, 1.0, ctx(2))
    assert bool(torch.isfinite(post.mean).all())
    flat = late_constraint(lambda found, label: found[0][:, :2] * 0, torch.zeros(1, 2, SIZE, SIZE), PATHS)(denoiser)
    assert torch.allclose(flat(x, 0.8, ctx(2)).mean, denoiser(x, 0.8, ctx(2)).mean), "no gradient, no move"


def test_nothing_happens_below_its_time_and_at_scale_0():
    denoiser, x = model(), noise(2, 1, SIZE, SIZE)
    learned, target = aligner(denoiser), noise(1, 2, SIZE, SIZE)
    options = {"solver": "ddim", "grid": "uniform", "steps": 4, "x": x}
    plain = sf.sample(denoiser, **options)
    assert torch.equal(sf.sample(late_constraint(learned, target, PATHS, scale=0.0)(denoiser), **options), plain)
    assert torch.equal(sf.sample(late_constraint(learned, target, PATHS, until=1.0)(denoiser), **options), plain)
    assert not torch.allclose(sf.sample(late_constraint(learned, target, PATHS)(denoiser), **options), plain, atol=1e-6)


@pytest.mark.parametrize("paths", [PATHS, ()], ids=["features", "state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_item_i_never_depends_on_the_batch(paths: tuple[str, ...], dtype: torch.dtype):
    denoiser = model(Flow(), "flow", dtype)
    learned, x = aligner(denoiser, dtype, paths), noise(3, 1, SIZE, SIZE, dtype=dtype)
    target = noise(3, 2, SIZE, SIZE, seed=4, dtype=dtype)
    options = {"solver": "ddim", "grid": "uniform", "steps": 3}
    whole = sf.sample(late_constraint(learned, target, paths, scale=0.5)(denoiser), x=x, **options)
    alone = sf.sample(late_constraint(learned, target[1:2], paths, scale=0.5)(denoiser), x=x[1:2], **options)
    assert whole.dtype == dtype and torch.allclose(whole[1:2], alone, atol=1e-3 if dtype == torch.float32 else 1e-8)


def test_around_classifier_free_guidance_the_conditional_features_count():
    denoiser, x, cond = model(), noise(2, 1, SIZE, SIZE), {"y": torch.tensor([0, 1])}
    learned, target = aligner(denoiser), noise(2, 2, SIZE, SIZE)
    around = late_constraint(learned, target, PATHS)
    readings = [
        around(cfg(3.0, batched=batched)(denoiser))(x, 0.7, ctx(2, cond=cond)).mean for batched in (True, False)
    ]
    assert torch.allclose(*readings, atol=1e-9)
    assert not torch.allclose(readings[0], cfg(3.0)(denoiser)(x, 0.7, ctx(2, cond=cond)).mean, atol=1e-6)


def test_what_cannot_be_is_refused():
    denoiser, x = model(), noise(2, 1, SIZE, SIZE)
    learned = aligner(denoiser)
    for target in (noise(2, 1, SIZE, SIZE), noise(3, 2, SIZE, SIZE), noise(2, 2, 4, 4)):
        with pytest.raises(InputError, match="the target is"):
            late_constraint(learned, target, PATHS)(denoiser)(x, 0.7, ctx(2))
    with pytest.raises(InputError, match="tap the same layers"):
        late_constraint(learned, noise(2, 2, SIZE, SIZE), PATHS[::-1])(denoiser)(x, 0.7, ctx(2))
    with pytest.raises(InputError, match="no submodule"):
        late_constraint(learned, noise(2, 2, SIZE, SIZE), ("level.nothing",))(denoiser)(x, 0.7, ctx(2))
    for numbers in ({"until": -0.1}, {"scale": -1.0}):
        with pytest.raises(InputError):
            late_constraint(learned, noise(2, 2, SIZE, SIZE), PATHS, **numbers)(denoiser)
    with pytest.raises(InputError, match="whole multiple"):
        aligner_for(denoiser, PATHS, x[:1], torch.zeros(1, 1, 12, 12))
    with pytest.raises(InputError, match="norm"):
        ConditionAligner([4], norm="layer")


# ------------------------------------------------------------------ the aligner and its training


def test_the_aligner_reads_maps_and_tokens_of_any_size():
    net = ConditionAligner([4, 6], 1, (4, 4), 2, widths=(8,))
    maps = [torch.randn(2, 4, 2, 2), torch.randn(2, 6, 8, 8)]
    assert net(maps, torch.rand(2)).shape == (2, 1, 8, 8)
    tokens = maps[1].flatten(2).transpose(1, 2)
    label = torch.tensor([0.3, 0.8])
    assert torch.equal(net(maps, label), net([maps[0], tokens], label)) and torch.equal(square(tokens), maps[1])
    with pytest.raises(InputError, match="square"):
        square(torch.zeros(2, 7, 3))


def test_training_teaches_the_aligner_and_leaves_the_denoiser_alone():
    denoiser = model(dtype=torch.float32)
    learned = aligner(denoiser, torch.float32).train()
    objective = ConditionAlignment(denoiser, learned, PATHS, times=Uniform(0.05, 0.3))
    before = [p.clone() for p in denoiser.parameters()]
    assert list(objective.players()) == ["aligner"] and not any("denoiser" in k for k in objective.state_dict())
    assert not objective.couples and ConditionAlignment(denoiser, ConditionAligner([8], norm="batch"), PATHS).couples

    def batch(it: int) -> dict[str, Tensor]:
        x = noise(16, 1, SIZE, SIZE, seed=it, dtype=torch.float32)
        x = torch.nn.functional.avg_pool2d(x, 3, 1, 1) * 3
        return {"x": x, "target": torch.cat([(x > 0).float(), x], 1), "cond": {}}

    def error(net: nn.Module) -> float:
        with torch.no_grad():
            return float(
                ConditionAlignment(denoiser, net, PATHS, times=Uniform(0.05, 0.3))(batch(999), Context.of(16, 1)).total
            )

    first = error(learned)
    taught = Trainer(objective, batch, steps=60, lr=3e-3, cpu=True, progress=False, ema=0.8).fit()["aligner"]
    assert error(taught) < 0.5 * first
    assert all(torch.equal(a, b) for a, b in zip(before, denoiser.parameters(), strict=True))
    with pytest.raises(InputError, match="target"):
        objective({"x": batch(0)["x"]}, Context.of(16, 1))
    with pytest.raises(InputError, match="targets are"):
        objective({**batch(0), "target": batch(0)["target"][:, :1]}, Context.of(16, 1))


def test_without_paths_the_state_is_what_is_read():
    denoiser, x = model(), noise(2, 1, SIZE, SIZE)
    assert read(denoiser, x, 0.5, ctx(2), ())[0] is x
    assert [h.shape[1] for h in read(denoiser, x, 0.5, ctx(2), PATHS)] == [8, 16]
