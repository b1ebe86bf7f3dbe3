"""Region-adaptive sampling: everything active is the plain network, and items, runs and readings never meet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from two_threads import apart

import sfumato as sf
from sfumato import networks, processes
from sfumato.acceleration import deepcache, operations, region_adaptive, token_merging
from sfumato.acceleration.regions import choose, focus
from sfumato.core import Context, InputError
from sfumato.guidance import cfg


def denoiser(patch=1, **options):
    torch.manual_seed(0)
    net = networks.DiT(
        2, size=8, patch=patch, width=32, depth=3, heads=2, embeddings={"y": 3}, context_channels=6, **options
    )
    for p in net.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    return sf.parametrized(net.eval().requires_grad_(False), processes.Flow(), "flow", null={"y": 3})


def run(d, n=3, **options):
    settings = {"solver": "euler", "steps": 7, "shape": (n, 2, 8, 8), "cond": {"y": torch.arange(n) % 3}, "seed": 1}
    with torch.no_grad():
        return sf.sample(d, **{**settings, **options})


def call(net, x, label=0.4, **cond):
    with torch.no_grad():
        return net(x, torch.full((len(x),), label), **cond)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_network_on_all_tokens_is_itself_in_any_order(patch):
    net, x = denoiser(patch).net, torch.randn(3, 2, 8, 4)
    n = 32 // patch**2
    order = torch.stack([torch.randperm(n) for _ in range(3)])
    torch.testing.assert_close(call(net, x, active=order), call(net, x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_network_on_some_tokens_sees_no_others(patch):
    net, x = denoiser(patch).net, torch.randn(2, 2, 8, 8)
    n = 64 // patch**2
    active = torch.stack([torch.randperm(n)[:5].sort().values for _ in range(2)])
    mask = torch.zeros(2, n).scatter(1, active, 1.0).view(2, 1, 8 // patch, 8 // patch)
    mask = F.interpolate(mask, scale_factor=patch).bool()
    out = call(net, x, active=active)
    assert (out.masked_select(mask) != 0).all() and (out.masked_select(~mask) == 0).all()
    assert torch.equal(call(net, torch.where(mask, x, 7.0), active=active), out)
    torch.testing.assert_close(call(net, x[1:], active=active[1:]), out[1:], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpm-solver++"])
def test_everything_active_is_dense(guided, solver):
    d = cfg(3.0)(denoiser()) if guided else denoiser()
    torch.testing.assert_close(
        run(region_adaptive(1.0, 1)(d), solver=solver), run(d, solver=solver), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(run(region_adaptive(0.5, 7, ())(d)), run(d))  # no call is partial


def test_keys_of_all_tokens_are_attended_to():
    """With a state that stands still the kept keys are the exact ones: a partial call is the dense one."""
    d, x = denoiser(), torch.randn(2, 2, 8, 8)
    for keys, exact in ((True, True), (False, False)):
        ctx, wrapped = Context.of(2, cond={"y": torch.tensor([0, 1])}), region_adaptive(0.25, 1, keys=keys)(d)
        with torch.no_grad():
            whole, part = (wrapped(x, 0.5, ctx).native for _ in range(2))
        assert torch.allclose(part, whole, atol=1e-5) == exact


def test_what_is_not_active_keeps_its_output_and_the_rest_is_new():
    d, x = denoiser(), torch.randn(2, 2, 8, 8)
    ctx, wrapped = Context.of(2), region_adaptive(0.25, 1)(d)
    with torch.no_grad():
        before = wrapped(x, 0.5, ctx).native
        chosen = choose(focus(before, 1), torch.zeros(2, 64), 48)
        after = wrapped(x + 0.3, 0.4, ctx).native
    changed = (after != before).any(1).flatten(1)
    assert torch.equal(changed, torch.zeros(2, 64).scatter(1, chosen, 1.0).bool())


@pytest.mark.parametrize(
    "around",
    [
        lambda d, wrap: wrap(d),
        lambda d, wrap: wrap(cfg(3.0)(d)),
        lambda d, wrap: wrap(cfg(3.0, batched=False)(d)),
        lambda d, wrap: cfg(3.0)(wrap(d)),
    ],
)
@pytest.mark.parametrize("metric", ["std", "norm", "random"])
def test_an_item_never_depends_on_its_batch(around, metric):
    d = around(denoiser(), region_adaptive(0.4, 2, (4,), metric=metric))
    torch.testing.assert_close(run(d)[:1], run(d, n=1, cond={"y": torch.tensor([0])}), atol=1e-5, rtol=1e-4)
    assert torch.equal(run(d), run(d))


def test_both_readings_of_guidance_share_the_choice_and_not_the_keys():
    d, seen = denoiser(), []
    hook = d.net.register_forward_hook(lambda m, a, kw, out: seen.append(kw.get("active")), with_kwargs=True)
    one = run(region_adaptive(0.3, 2)(cfg(3.0)(d)))
    hook.remove()
    assert all(a is None for a in seen[:2]) and all(torch.equal(a[:3], a[3:]) for a in seen[2:])
    other = run(region_adaptive(0.3, 2)(cfg(3.0, batched=False)(d)))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_guidance_that_begins_half_way_needs_a_full_call_there():
    d = cfg(3.0, interval=(0.0, 0.6))(denoiser())
    with pytest.raises(InputError, match="resets=\\(2"):
        run(region_adaptive(0.5, 1)(d))
    assert torch.isfinite(run(region_adaptive(0.5, 1, (2,))(d))).all()


def test_work_falls_as_declared():
    d = denoiser()
    dense = operations(lambda: run(d, steps=1))
    calls = {r: (operations(lambda r=r: run(region_adaptive(r, 2, (5,))(d))) - 3 * dense) / 4 / dense for r in (0.125, 0.5, 1.0)}  # fmt: skip
    assert calls[1.0] == 1.0
    slope = (calls[1.0] - calls[0.5]) / 0.5
    assert slope > 0.8 and calls[0.125] == pytest.approx(1 - 0.875 * slope, rel=1e-6)  # linear in the active tokens
    assert operations(lambda: run(region_adaptive(0.5, 7)(d))) == 7 * dense


def test_runs_in_two_threads_never_meet():
    d = region_adaptive(0.3, 1)(cfg(2.0)(denoiser()))
    apart(lambda seed: run(d, seed=seed))


def test_a_look_ahead_leaves_no_trace():
    d, x = region_adaptive(0.3, 1)(denoiser()), torch.randn(2, 2, 8, 8)
    ctx, same = Context.of(2), Context.of(2)
    with torch.no_grad():
        for c in (ctx, same):
            d(x, 0.9, c)
        d(x * 2, 0.7, ctx.fork(look=True))
        assert torch.equal(d(x, 0.8, ctx).native, d(x, 0.8, same).native)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), high=st.floats(0, 1), data=st.data())
def test_the_choice_is_its_definition(seed, n, high, data):
    count = data.draw(st.integers(0, n - 1))
    generator = torch.Generator().manual_seed(seed)
    importance, skipped = (
        torch.rand(2, n, generator=generator),
        torch.randint(0, 3, (2, n), generator=generator).float(),
    )
    chosen = choose(importance, skipped, count, high, 0.5, exact=True)
    raised = importance.double() * (0.5 * skipped).double().exp()
    most = round(high * count)
    for row, values in zip(chosen, raised, strict=True):
        order = values.argsort().tolist()
        out = set(order[: count - most]) | set(order[n - most :])
        assert row.tolist() == sorted(set(range(n)) - out)


@pytest.mark.parametrize("high", [0.0, 0.3, 1.0])
def test_no_token_starves(high):
    importance, skipped = torch.rand(1, 30) + 0.1, torch.zeros(1, 30)
    for _ in range(40):
        active = choose(importance, skipped, 20, high, 1.0)
        skipped = skipped + 1 - torch.zeros(1, 30).scatter(1, active, 1.0)
    assert skipped.max() < 40 and skipped.max() - skipped.min() <= 12


def test_focus_is_a_mean_over_the_pixels_of_a_token():
    x = torch.randn(2, 3, 4, 6)
    values = x[1, :, 2:4, 4:6].std(0).mean()
    torch.testing.assert_close(focus(x, 2)[1, 1 * 3 + 2], values)
    torch.testing.assert_close(focus(x, 1, "norm")[0], x[0].square().sum(0).sqrt().flatten())


def test_refusals():
    d = denoiser()
    unet = sf.parametrized(networks.UNet(2, width=8, multipliers=(1,), attention=False), processes.Flow(), "flow")
    x = torch.zeros(1, 2, 8, 8)
    for made, said in [
        (lambda: region_adaptive(0.0), "ratio"),
        (lambda: region_adaptive(1.2), "ratio"),
        (lambda: region_adaptive(start=0), "start"),
        (lambda: region_adaptive(resets=(-1,)), "resets"),
        (lambda: region_adaptive(metric="best"), "std, norm, random"),
        (lambda: region_adaptive(high=1.5), "high"),
        (lambda: region_adaptive()(unet), "UNet"),
        (lambda: run(region_adaptive(resets=(7,))(d)), "7 steps"),
        (lambda: call(d.net, x, active=torch.zeros(1, 65, dtype=torch.int64)), "0..63"),
        (lambda: call(d.net, x, active=torch.zeros(1, 3)), "int64"),
        (lambda: region_adaptive()(d)(x.requires_grad_(), 0.5, Context.of(1)), "gradient"),
    ]:
        with pytest.raises(InputError, match=said):
            made()
    ctx, wrapped = Context.of(1), region_adaptive(0.5, 1)(d)
    with torch.no_grad():
        wrapped(torch.zeros(1, 2, 8, 8), 0.5, ctx)
        with pytest.raises(InputError, match="own fork"):
            wrapped(torch.zeros(1, 2, 4, 4), 0.5, ctx)
    for other in (deepcache(2, 0), token_merging(0.5)):
        for both in (other(region_adaptive(0.5, 1)(d)), region_adaptive(0.5, 1)(other(d))):
            with pytest.raises(InputError, match="go together"):
                run(both)
