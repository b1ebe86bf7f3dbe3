"""Quantisers, calibration sets, quantised networks, their files, and integers in the place of floats."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sfumato as sf
from sfumato import acceleration, networks, processes
from sfumato.acceleration import Calibration, denoised, int8, noised, quantization, quantized
from sfumato.acceleration.calibration import shares, told
from sfumato.acceleration.integers import Int8
from sfumato.acceleration.quantization import Quantized, Rounded
from sfumato.acceleration.ranges import SEARCHES, Quantizer, per_channel, quantizer, search
from sfumato.core import Context, InputError, Streams
from sfumato.guidance import cfg

N = 6
LABELS = {"y": torch.arange(N) % 3}


def denoiser(name="unet", process=None, kind="v"):
    torch.manual_seed(0)
    if name == "unet":
        net = networks.UNet(2, width=8, multipliers=(1, 2), blocks=1, attention=(False, True), embeddings={"y": 3})
    else:
        net = networks.DiT(2, size=8, patch=2, width=32, depth=3, heads=2, embeddings={"y": 3})
    for p in net.parameters():
        p.data = p.data + 0.05 * torch.randn_like(p)
    made = sf.parametrized(net.eval().requires_grad_(False), process or processes.Cosine(), kind, null={"y": 3})
    return made


def calibrated(d, n=24, **options):
    return denoised(d, n, (2, 8, 8), cond={"y": torch.arange(n) % 3}, **{"steps": 5, **options})


def call(d, x, t=0.4, cond=None):
    with torch.no_grad():
        return d(x, t, Context(cond=LABELS if cond is None else cond, batch=len(x))).native


def run(d, n=3, **options):
    given = {"solver": "ddim", "steps": 4, "shape": (n, 2, 8, 8), "cond": {"y": torch.arange(n) % 3}, "seed": 1}
    with torch.no_grad():
        return sf.sample(d, **{**given, **options})


# ------------------------------------------------------------------------------------------------------- quantisers


@given(low=st.floats(-50, 0), high=st.floats(0, 50), bits=st.integers(2, 12), seed=st.integers(0, 99))
def test_a_quantiser_is_idempotent_bounded_and_holds_zero(low, high, bits, seed):
    q = quantizer(low, high, bits)
    x = 60 * torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = q(x)
    assert torch.equal(q(y), y)
    assert len(y.unique()) <= 2**bits
    assert float(q(torch.zeros(1))) == 0
    inside = (x >= q.low) & (x <= q.high)
    assert bool(((x - y).abs()[inside] <= q.scale / 2 * (1 + 1e-9)).all())
    assert bool((y[x > q.high] == q.high).all()) and bool((y[x < q.low] == q.low).all())
    assert q.high - q.low == pytest.approx(max(high - low, 1e-8 * (2**bits - 1)), rel=1e-9)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_never_leaves_the_range_and_serves_its_criterion(method, symmetric):
    x = torch.distributions.StudentT(3.0).sample((20_000,)).clamp(-60, 80)
    q = search(x, 5, method, symmetric=symmetric)
    edge = float(x.abs().max())
    assert q.low >= -edge * 1.05 and q.high <= edge * 1.05
    error = {m: float((search(x, 5, m, p=2.0)(x) - x).square().mean()) for m in SEARCHES}
    assert error["lp"] <= 1.02 * min(error.values())  # the histogram's bins are not the values
    angle = {m: torch.cosine_similarity(search(x, 5, m)(x), x, dim=0) for m in SEARCHES}
    assert angle["cosine"] >= 0.995 * max(angle.values())


def test_one_sided_values_spend_all_codes_on_their_side():
    assert search(torch.rand(1000), 8).zero == 0
    assert search(-torch.rand(1000), 8).zero == 255


def test_channels_have_their_own_ranges_and_more_bits_are_nearer():
    w = torch.randn(5, 7, 3, 3) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 0.0]).view(-1, 1, 1, 1)
    last = torch.inf
    for bits in (2, 4, 8, 12, 16):
        q = per_channel(w, bits)
        error = (q(w) - w).flatten(1).norm(dim=1)[:4] / w.flatten(1).norm(dim=1)[:4]
        assert float(error.max()) < last
        assert float(q(w)[4].abs().max()) == 0
        last = float(error.max())
    assert last < 1e-4


def test_gradients_pass_straight_through_within_the_range():
    x = torch.tensor([-9.0, -0.3, 0.7, 9.0], requires_grad=True)
    q = quantizer(-1, 1, 4)
    q(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert torch.equal(q(x).detach(), q(x.detach()))


# -------------------------------------------------------------------------------------------------- calibration sets


@pytest.mark.parametrize("times", ["normal", "uniform", 0.0, 0.5, 1.0])
def test_a_state_is_paired_with_its_own_time_and_label(times):
    d, n = denoiser(), 12
    cal = calibrated(d, n, times=times, dropout=0.0, batch=5, seed=3)
    assert torch.equal(cal.cond["y"], torch.arange(n) % 3)
    clock = sf.grids.get("arctan")(d.process, 5, 1.0, 0.0).double()
    states = list(sf.trajectory(d, solver="ddim", grid="arctan", steps=5, shape=(n, 2, 8, 8), cond=cal.cond, seed=[s for s in _seeds(3, n)]))  # fmt: skip
    for i in range(n):
        step = int((clock[:-1] - cal.t[i]).abs().argmin())
        assert float(clock[step]) == float(cal.t[i])
        torch.testing.assert_close(cal.x[i], states[step].x[i], atol=1e-5, rtol=1e-4)
    if times == 1.0:
        assert bool((cal.t == 1).all())
    if times == 0.0:
        assert bool((cal.t == clock[-2]).all())


def _seeds(seed, n):
    from sfumato.core import mix

    return [mix(seed, i) for i in range(n)]


def test_the_published_slip_stores_the_mirrored_time():
    d = denoiser()
    a, b = (calibrated(d, seed=2, legacy_pairing=slip) for slip in (False, True))
    clock = sf.grids.get("arctan")(d.process, 5, 1.0, 0.0).double()[:-1].tolist()
    assert torch.equal(a.x, b.x)
    assert [clock.index(t) for t in a.t.tolist()] == [4 - clock.index(t) for t in b.t.tolist()]


def test_shares_of_a_run():
    streams = Streams.of(0, 4000)
    normal = shares(4000, "normal", 0.4, 0.4, "clamp", streams)
    assert 0.13 < float((normal == 0).double().mean()) < 0.19  # Phi(-1)
    assert 0.05 < float((normal == 1).double().mean()) < 0.085  # 1 - Phi(1.5)
    again = shares(4000, "normal", 0.4, 0.4, "redraw", Streams.of(0, 4000))
    assert bool(((again > 0) & (again < 1)).all())
    even = shares(4000, "uniform", 0, 0, "clamp", Streams.of(1, 4000))
    assert abs(float(even.mean()) - 0.5) < 0.02


def test_noised_data_follow_the_process():
    d, x0 = denoiser(), torch.full((2000, 2, 1, 1), 2.0)
    cal = noised(d, x0, times=0.5, cond={"y": torch.zeros(2000, dtype=torch.int64)}, dropout=0.25)
    c = d.process.coef(0.5)
    assert abs(float(cal.x.mean()) - 2 * c.alpha) < 0.05 and abs(float(cal.x.std()) - c.sigma) < 0.05
    assert 0.2 < float((cal.cond["y"] == 3).double().mean()) < 0.3
    assert torch.equal(noised(d, x0, times=0.0, cond={}).x, x0) and float(told(cal, 1.0).t.min()) == 1


# ------------------------------------------------------------------------------------------------ quantised networks


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_sixteen_bits_lose_nearly_nothing_and_fewer_lose_more(name):
    d = denoiser(name)
    cal = calibrated(d)
    part = cal.select(slice(0, N))
    y = call(d, part.x, part.t, part.cond)
    found = [call(quantized(d, cal, weights=b, activations=b), part.x, part.t, part.cond) for b in (16, 8, 5, 3)]
    errors = [float((v - y).norm() / y.norm()) for v in found]
    assert errors[0] < 1e-3 and errors == sorted(errors)
    assert errors[1] < 0.05


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_the_given_model_is_untouched_and_paths_stay(name):
    d = denoiser(name)
    before = {k: v.clone() for k, v in d.state_dict().items()}
    x, y = torch.randn(N, 2, 8, 8), None
    y = call(d, x)
    q = quantized(d, calibrated(d))
    assert all(torch.equal(v, before[k]) for k, v in d.state_dict().items())
    assert torch.equal(call(d, x), y) and not any(isinstance(m, Quantized) for m in d.modules())
    assert {p for p, _ in d.net.named_modules()} <= {p for p, _ in q.net.named_modules()}


@pytest.mark.parametrize("make", [quantized, int8])
@pytest.mark.parametrize("name", ["unet", "dit"])
def test_an_item_never_depends_on_its_batch_or_on_other_threads(make, name):
    d = denoiser(name)
    q = make(d, calibrated(d))
    x = torch.randn(N, 2, 8, 8)
    whole, single = call(q, x), call(q, x[:1], cond={"y": LABELS["y"][:1]})
    assert float((whole[:1] - single).norm() / single.norm()) < 0.02  # a rounding may move a value to the next code
    alone, found = [run(q, seed=s) for s in (1, 2)], {}
    threads = [threading.Thread(target=lambda s=s: found.update({s: run(q, seed=s)})) for s in (1, 2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(found[s], alone[s - 1]) for s in (1, 2))


@pytest.mark.parametrize("make", [quantized, int8])
@pytest.mark.parametrize("process,kind", [(processes.Flow(), "flow"), (processes.VP(), "eps")])
def test_it_goes_under_guidance_solvers_and_taps(make, process, kind):
    from sfumato.denoisers.features import features

    d = denoiser("dit", process, kind)
    q = make(cfg(2.0)(d), calibrated(cfg(2.0)(d), dropout=0.5))
    for solver in ("ddim", "dpm-solver++", "heun"):
        a, b = run(q, solver=solver, start=0.9, x=torch.randn(3, 2, 8, 8), shape=None), run(cfg(2.0)(d), solver=solver, start=0.9, x=torch.randn(3, 2, 8, 8), shape=None)  # fmt: skip
        assert torch.isfinite(a).all() and a.shape == b.shape
    with torch.no_grad():
        _, seen = features(
            q, torch.randn(2, 2, 8, 8), 0.5, Context(cond={"y": torch.tensor([0, 1])}, batch=2), ["blocks.1"]
        )
    assert seen["blocks.1"].shape == (2, 16, 32)


def test_weights_have_few_values_and_only_tokens_and_maps_are_rounded():
    d = denoiser()
    q = quantized(d, calibrated(d), weights=4, activations=6)
    layers = quantization.layers(q)
    assert {m.bits for m in layers.values()} == {4}
    assert all(len(row.unique()) <= 16 for m in layers.values() for row in m.base.weight.flatten(1))
    vectors = [p for p, m in layers.items() if m.input is None]
    assert vectors and all("modulation" in p or "conditioning" in p for p in vectors)
    assert "input" not in layers and "output" not in layers
    edged = quantization.layers(quantized(d, calibrated(d), weights=4, activations=6, edges=8))
    assert edged["input"].bits == edged["output"].bits == edged["input"].input.bits == 8


def test_products_of_attentions_are_quantised_unless_left_out():
    d = denoiser("dit")
    cal = calibrated(d)
    x, y = cal.x[:N], call(d, cal.x[:N])
    others = "mlp|final|input|conditioning|modulation|query|key|value|out"
    with pytest.raises(InputError, match="no linear layer"):
        quantized(d, cal, skip=others)
    only = quantized(d, cal, weights=16, activations=2, skip=others.replace("|out", ""))
    left = quantized(d, cal, weights=16, activations=2, skip=others.replace("|out", ""), attention=False)
    for module in left.modules():
        assert not hasattr(module, "products")
    assert float((call(only, x) - y).norm()) != float((call(left, x) - y).norm())


def test_a_diffusers_network_too():
    pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    d = sf.from_diffusers(tiny.pipeline("pixels")).denoiser
    cal = Calibration(torch.randn(8, 3, 8, 8), torch.linspace(0.3, 0.9, 8))  # its random weights know no clean states
    ctx = Context(batch=4)
    with torch.no_grad():
        y = d(cal.x[:4], cal.t[:4], ctx).native
        for make in (quantized, int8):
            found = make(d, cal)(cal.x[:4], cal.t[:4], ctx).native
            assert 0 < float((found - y).norm() / y.norm()) < 0.05


def test_rounded_states_are_states_of_the_quantiser():
    d = denoiser()
    q = quantizer(-3, 3, 6)
    with torch.no_grad():
        x = sf.sample(d, solver=Rounded(sf.solvers.get("ddim"), q), grid="uniform", steps=3, shape=(2, 2, 8, 8), cond={"y": torch.tensor([0, 1])})  # fmt: skip
    assert torch.equal(q(x), x)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("bits", [3, 4, 8, 12])
def test_a_file_is_small_and_gives_the_same_network(bits, tmp_path):
    d = denoiser("dit")
    q = quantized(d, calibrated(d), weights=bits)
    size = quantization.save(q, tmp_path / "q.safetensors")
    held = sum(m.base.weight.numel() for m in quantization.layers(q).values())
    assert size < 4 * sum(p.numel() for p in d.parameters()) - held * (4 - {3: 0.5, 4: 0.5, 8: 1, 12: 2}[bits]) + 40_000
    back = quantization.load(d, tmp_path / "q.safetensors")
    x = torch.randn(N, 2, 8, 8)
    assert torch.equal(call(back, x), call(q, x))
    with pytest.raises(InputError, match="another"):
        quantization.load(denoiser("unet"), tmp_path / "q.safetensors")


# ---------------------------------------------------------------------------------------------------------- integers


@pytest.mark.parametrize("low,high", [(-3.0, 3.0), (-0.28, 4.0), (0.0, 3.0), (-5.0, 0.0)])
@pytest.mark.parametrize(
    "base,shape",
    [
        (nn.Linear(24, 40), (3, 10, 24)),
        (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 8, 8)),
        (nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False), (2, 16, 9, 7)),
        (nn.Conv2d(16, 32, 1, groups=2), (2, 16, 8, 8)),
    ],
    ids=["linear", "convolution", "strided", "grouped"],
)
def test_integers_compute_what_floats_simulate(base, shape, low, high):
    layer = Quantized(base, per_channel(base.weight, 8))
    layer.input = quantizer(low, high, 8)
    real, x = Int8(layer), 2 * torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(real(x), layer(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(real.weight, layer.base.weight)
        x[:] = -x  # in place: codes of the old values must not be used again
        torch.testing.assert_close(real(x), layer(x), atol=1e-4, rtol=1e-4)


def test_integers_are_near_the_full_network():
    for name in ("unet", "dit"):
        d = denoiser(name)
        cal = calibrated(d)
        real = int8(quantized(d, cal, attention=False))
        assert sum(isinstance(m, Int8) for m in real.modules()) > 10
        y = call(d, cal.x[:N], cal.t[:N], {"y": cal.cond["y"][:N]})
        assert float((call(real, cal.x[:N], cal.t[:N], {"y": cal.cond["y"][:N]}) - y).norm() / y.norm()) < 0.05


@settings(max_examples=15, deadline=None)
@given(bits=st.sampled_from([-1, 0, 1, 17, 2.5]))
def test_refusals_of_bits(bits):
    with pytest.raises(InputError, match="bits"):
        quantizer(-1, 1, bits)


def test_refusals():
    d = denoiser()
    cal = calibrated(d)
    z = torch.zeros
    broken = Calibration(cal.x, cal.t, cal.cond)
    for call_, said in [
        (lambda: quantized(d, cal, weights=1), "bits"),
        (lambda: quantized(d, cal, search="odd"), "search"),
        (lambda: quantized(d, cal, skip=".*"), "no linear layer"),
        (lambda: quantized(quantized(d, cal), cal), "already"),
        (lambda: Calibration(z(0, 2), z(0)), "empty"),
        (lambda: Calibration(z(2, 2) / 0, z(2)), "finite"),
        (lambda: Calibration(z(2, 2), z(3)), "one of each"),
        (lambda: Calibration(z(2, 2), z(2) + 2), "within"),
        (lambda: search(torch.tensor([float("nan")]), 8), "finite"),
        (lambda: calibrated(d, 4, outside="drop"), "outside"),
        (lambda: calibrated(d, 4, std=0.0), "std"),
        (lambda: int8(d), "not quantised"),
        (lambda: int8(quantized(d, broken, weights=16)), "bits"),
        (lambda: int8(quantized(d, cal, activations=None)), "activations=8"),
        (lambda: call(int8(d, cal).double(), cal.x[:N].double()), "float32"),
    ]:
        with pytest.raises((InputError, RuntimeError), match=said):
            call_()
    assert isinstance(quantizer(-1, 1, 8), Quantizer)


def test_a_layer_that_calibration_never_reaches_is_named():
    class Two(nn.Module):
        accepts = frozenset()

        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x, label):
            return self.used(x)

    d = sf.parametrized(Two(), processes.Flow(), "flow")
    with pytest.raises(InputError, match="idle"):
        quantized(d, denoised(d, 4, (2, 4, 4), steps=2))


def test_specs_are_fitted_to_the_pipelines_own_runs_and_compose() -> None:
    pipe = sf.load("digits")
    plain = pipe.generate(["three", "five"], steps=6, guidance=2.0)
    calibration = pipe.calibration(8, 4, 3)
    again = pipe.calibration(8, 4, 3)
    assert torch.equal(calibration.x, again.x) and len(calibration) == 8 and set(calibration.cond) == {"y"}
    by_hand = dataclasses.replace(pipe, denoiser=acceleration.quantized(pipe.denoiser, calibration))
    by_name = pipe.accelerated("quantized(items=8, steps=4, seed=3)")
    drawn = [p.generate(["three", "five"], steps=6, guidance=2.0) for p in (by_hand, by_name)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], plain)
    fine = pipe.generate(
        ["three", "five"], steps=6, guidance=2.0, accelerate="quantized(weights=16, activations=16, items=64)"
    )
    assert (fine.double() - plain.double()).abs().mean() < 2
    both = pipe.generate(["three"], steps=6, accelerate="int8(items=8, steps=4) | deepcache(interval=2)")
    assert both.shape == (1, 1, 8, 8)
    with pytest.raises(InputError, match="give a Pipeline"):
        acceleration.get("int8")
