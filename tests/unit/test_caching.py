"""Caches of features: exact where every call is full, counted, apart between runs, and never a gradient through them."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from two_threads import apart

import sfumato as sf
from sfumato import networks, processes
from sfumato.acceleration import around, cached, deepcache, every, operations
from sfumato.acceleration.caching import deep_modules
from sfumato.core import InputError
from sfumato.guidance import cfg


def denoiser(name="unet"):
    torch.manual_seed(0)
    if name == "unet":
        net = networks.UNet(2, width=8, multipliers=(1, 2), blocks=1, attention=(False, True), embeddings={"y": 3})
    else:
        net = networks.DiT(2, size=8, patch=2, width=32, depth=5, heads=2, embeddings={"y": 3})
    for p in net.parameters():
        p.data = p.data + 0.05 * torch.randn_like(p)
    return sf.parametrized(net.eval().requires_grad_(False), processes.Cosine(), "v", null={"y": 3})


def run(d, n=3, **options):
    settings = {"solver": "ddim", "steps": 7, "shape": (n, 2, 8, 8), "cond": {"y": torch.arange(n) % 3}, "seed": 1}
    with torch.no_grad():
        return sf.sample(d, **{**settings, **options})


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm-solver++", "heun"])
def test_every_call_in_full_is_the_network_bit_for_bit(name, solver):
    d = denoiser(name)
    assert torch.equal(run(deepcache(1)(d), solver=solver), run(d, solver=solver))
    assert torch.equal(run(cfg(2.0)(deepcache(1)(d)), solver=solver), run(cfg(2.0)(d), solver=solver))


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_deep_modules_run_at_the_full_calls_only(name):
    d = denoiser(name)
    (first, *_), _ = deep_modules(d.net, 0)
    calls = []
    d.net.get_submodule(first).register_forward_hook(lambda *a: calls.append(1))
    run(deepcache(3)(d))
    assert len(calls) == 3  # calls 0, 3, 6 of 7
    calls.clear()
    run(deepcache(3, last=1)(d), steps=6)
    assert len(calls) == 3  # 0, 3 and the last


def test_attention_is_counted():
    q, k = torch.randn(1, 2, 64, 16), torch.randn(1, 2, 10, 16)
    assert operations(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k)) == 2 * 2 * (2 * 64 * 10 * 16)


def test_less_work_is_counted_and_costs_little():
    d = denoiser("dit")
    plain, fast = (operations(lambda e=e: run(e)) for e in (d, deepcache(3)(d)))
    assert fast < 0.7 * plain
    assert (run(deepcache(2)(d)) - run(d)).abs().mean() < (run(deepcache(5)(d)) - run(d)).abs().mean()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: deepcache(3)(d),
        lambda d: cfg(3.0)(deepcache(3)(d)),
        lambda d: cfg(3.0, batched=False)(deepcache(3)(d)),
    ],
)
def test_an_item_never_depends_on_its_batch(wrap):
    d = wrap(denoiser())
    torch.testing.assert_close(run(d)[:1], run(d, n=1, cond={"y": torch.tensor([0])}), atol=1e-5, rtol=1e-4)


def test_runs_in_two_threads_never_meet():
    d = deepcache(3)(denoiser())
    apart(lambda seed: run(d, seed=seed))


def test_guidance_that_stops_half_way_keeps_its_own_features():
    d = cfg(3.0, interval=(0.3, 0.8))(deepcache(2)(denoiser()))
    assert torch.isfinite(run(d)).all()


@given(total=st.integers(1, 120), interval=st.integers(1, 9), center=st.floats(0, 60), power=st.floats(1, 3))
def test_the_uneven_schedule_has_as_many_full_calls_and_the_first(total, interval, center, power):
    full = around(center, power, interval)
    chosen = [i for i in range(total) if full(i, total)]
    assert 0 in chosen and len(chosen) <= -(-total // interval) + 1
    assert [i for i in range(total) if full(i, None)] == [i for i in range(total) if every(interval)(i, total)]


def test_it_is_denser_at_its_center():
    chosen = [i for i in range(50) if around(20.0, 2.0, 5)(i, 50)]
    gaps = {b: b - a for a, b in zip(chosen, chosen[1:], strict=False)}
    near = [g for b, g in gaps.items() if abs(b - 20) < 10]
    assert max(near) < max(gaps.values())


def test_refusals():
    d = denoiser()
    for call, said in [
        (lambda: deepcache(0)(d), "interval"),
        (lambda: deepcache(2, branch=2)(d), "resolutions"),
        (lambda: deepcache(2, branch=-1)(d), "not negative"),
        (lambda: deepcache(schedule="odd"), "uniform"),
        (lambda: cached([]), "at least one"),
        (lambda: around(power=0.5), "power"),
        (lambda: run(cached(["nowhere"])(d)), "no submodule"),
        (lambda: deepcache(2)(sf.oracles.Gaussian([0.0], [[1.0]]).denoiser(processes.VP())), "0 networks"),
    ]:
        with pytest.raises(InputError, match=said):
            call()
    with pytest.raises(InputError, match="gradient"):
        x = torch.zeros(1, 2, 8, 8, requires_grad=True)
        deepcache(2)(d)(x, 0.5, sf.Context.of(1, cond={"y": torch.tensor([0])}))
    ctx = sf.Context.of(2, cond={"y": torch.tensor([0, 1])})
    fast = deepcache(2)(d)
    with torch.no_grad():
        fast(torch.zeros(2, 2, 8, 8), 0.5, ctx)
        with pytest.raises(InputError, match="own fork"):
            fast(torch.zeros(1, 2, 8, 8), 0.5, ctx.fork(cond={"y": torch.tensor([0])}))


def test_a_diffusers_network_is_cached_too():
    pytest.importorskip("diffusers")
    from diffusers import DDPMPipeline as Theirs
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = sf.from_diffusers(Theirs(net.eval(), DDPMScheduler()))
    pipe.denoiser.requires_grad_(False)
    plain = pipe.denoiser
    with torch.no_grad():
        start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        options = {"solver": "ddim", "steps": 5, "x": start, "start": 0.9}
        assert torch.equal(sf.sample(deepcache(1)(plain), **options), sf.sample(plain, **options))
        assert not torch.equal(sf.sample(deepcache(2)(plain), **options), sf.sample(plain, **options))


@pytest.mark.parametrize(
    "spec", ["deepcache(interval=2)", "deepcache(power=1.4)", "token-merging", "region-adaptive", "onednn"]
)
def test_an_accelerated_denoiser_goes_to_another_process(spec):
    """Pickled before a run and after one, which leaves taps on the modules."""
    plain = denoiser("dit")
    made = sf.acceleration.get(spec)(plain)
    sent = [pickle.loads(pickle.dumps(made))]
    want = run(made, cond={"y": torch.tensor([0, 1, 2])}, steps=4)
    sent.append(pickle.loads(pickle.dumps(made)))
    for other in sent:
        assert torch.equal(run(other, cond={"y": torch.tensor([0, 1, 2])}, steps=4), want)
