"""Features inside a network, directions among them, and edits by a shift: exact laws."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sfumato as sf
from sfumato import editing, grids, solvers
from sfumato.core import Context, InputError, trajectory
from sfumato.denoisers import features as inside
from sfumato.denoisers import parametrized
from sfumato.editing.directions import (
    Direction,
    Latents,
    collect,
    collect_noised,
    jacobian_directions,
    mean_difference,
    principal,
    project_out,
    random_like,
    singular_vectors,
)
from sfumato.guidance import cfg
from sfumato.guidance.internal import internal
from sfumato.networks import DiT, UNet
from sfumato.processes import VP, Flow

SIZE = 8


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def awake(net: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A network that says something: its zero layers are given weights."""
    for i, p in enumerate(net.parameters()):
        p.data = p.data if bool(p.any()) else 0.2 * noise(*p.shape, seed=i, dtype=p.dtype)
    return net.to(dtype).eval()


def unet(process: Any = None, predicts: str = "v", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    net = UNet(1, width=8, multipliers=(1, 2), blocks=1, attention=(False, True), heads=2, embeddings={"y": 2})
    return parametrized(awake(net, dtype), process or VP(), predicts, null={"y": 2})


def dit() -> Any:
    torch.manual_seed(0)
    return parametrized(awake(DiT(1, size=SIZE, width=16, depth=3, heads=2), torch.float64), Flow(), "flow")


def run(denoiser: Any, seed: int = 0, n: int = 3, solver: str = "ddpm", **options: Any) -> Tensor:
    x = noise(n, 1, SIZE, SIZE)
    return sf.sample(denoiser, solver=solver, grid="uniform", steps=4, x=x, seed=seed, **options)


# ------------------------------------------------------------------ features


def test_the_bottleneck_is_found_in_any_network():
    assert inside.bottleneck(unet()) == "level.deep.deep"
    assert inside.bottleneck(cfg(2.0)(unet())) == "level.deep.deep", "under guidance too"
    assert inside.bottleneck(dit()) == "blocks.1"
    with pytest.raises(InputError, match="path="):
        inside.bottleneck(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(InputError, match="0 networks"):
        inside.bottleneck(sf.oracles.Gaussian(torch.zeros(2), torch.eye(2)).denoiser(VP()))


@pytest.mark.parametrize(
    ("kind", "path"), [("pixels", "model.mid_block"), ("sd", "model.mid_block"), ("dit", "model.transformer_blocks.0")]
)
def test_the_bottleneck_of_diffusers_models_can_be_read_and_shifted(kind: str, path: str):
    pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    pipe = sf.from_diffusers(tiny.pipeline(kind))
    assert inside.bottleneck(pipe.denoiser) == path
    cond = {"label": torch.tensor([3, 4])} if kind == "dit" else pipe.conditions(2)
    latents = collect(pipe.denoiser, solver="ddim", steps=2, n=2, shape=pipe.codec.shape(*pipe.size), cond=cond)
    assert latents.h.shape[:2] == (2, 2) and latents.path == path
    shifted = mean_difference(latents, torch.tensor([True, False])).shift(3.0)(pipe.denoiser)
    x = latents.start
    plain, moved = (
        sf.sample(d, solver="ddim", grid="uniform", steps=2, x=x, cond=cond) for d in (pipe.denoiser, shifted)
    )
    assert torch.equal(plain, latents.x0) and not torch.allclose(plain, moved, atol=1e-4)


def test_features_are_those_of_the_call_and_leave_nothing_behind():
    denoiser, x = unet(), noise(2, 1, SIZE, SIZE)
    ctx = Context.of(2, None)
    plain = denoiser(x, 0.5, ctx).native
    post, found = inside.features(denoiser, x, 0.5, ctx, ["level.deep", "level.deep.deep"])
    assert torch.equal(post.native, plain) and ctx.taps == ()
    assert list(found) == ["level.deep", "level.deep.deep"]
    assert found["level.deep"].shape == (2, 8, SIZE, SIZE) and found["level.deep.deep"].shape == (
        2,
        16,
        SIZE // 2,
        SIZE // 2,
    )
    assert torch.equal(denoiser(x, 0.5, ctx).native, plain)
    with pytest.raises(InputError, match="never called"):
        inside.features(denoiser, x, 0.5, ctx, ["level.deep.down.stages.0.residual.shortcut", "conditioning.scalars"])
    with pytest.raises(InputError, match="no submodule"):
        inside.features(denoiser, x, 0.5, ctx, ["level.nothing"])
    with pytest.raises(InputError, match="not one tensor"):
        inside.features(denoiser, x, 0.5, ctx, ["level.down"])


def test_features_under_guidance_are_the_conditional_ones():
    denoiser, x, cond = unet(), noise(2, 1, SIZE, SIZE), {"y": torch.tensor([0, 1])}
    _, alone = inside.features(denoiser, x, 0.5, Context.of(2, None, cond=cond), ["level.deep.deep"])
    for batched in (True, False):
        guided = cfg(3.0, batched=batched)(denoiser)
        _, found = inside.features(guided, x, 0.5, Context.of(2, None, cond=cond), ["level.deep.deep"])
        assert torch.allclose(found["level.deep.deep"], alone["level.deep.deep"], atol=1e-12)


def test_two_threads_shift_one_network_each_its_own_way():
    denoiser = unet()
    vectors = [noise(1, 16, SIZE // 2, SIZE // 2, seed=i) for i in range(2)]
    shifted = [Direction(v, (1.0,)).shift(2.0)(denoiser) for v in vectors]
    alone, together = [run(d) for d in shifted], [[], []]
    gate = threading.Barrier(2)

    def work(i: int) -> None:
        gate.wait()
        together[i] += [run(shifted[i]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(x, alone[i]) for i in range(2) for x in together[i])
    assert not torch.allclose(alone[0], alone[1])


# ------------------------------------------------------------------ shifts


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm-solver++", "heun"])
def test_a_shift_of_nothing_is_the_plain_trajectory(solver: str):
    denoiser = unet(Flow(), "flow")
    direction = Direction(noise(1, 16, SIZE // 2, SIZE // 2), (1.0,))
    plain = run(denoiser, solver=solver)
    assert torch.equal(run(direction.shift(0.0)(denoiser), solver=solver), plain)
    assert torch.equal(run(direction.shift(2.0, interval=(0.0, 0.0))(denoiser), solver=solver), plain)
    assert torch.allclose(run(direction.shift(0.0, asymmetric=True)(denoiser), solver=solver), plain, atol=1e-12)
    assert not torch.allclose(run(direction.shift(2.0)(denoiser), solver=solver), plain, atol=1e-6)


def test_a_shift_adds_to_the_features_of_both_halves_of_guidance():
    denoiser, x, cond = unet(), noise(2, 1, SIZE, SIZE), {"y": torch.tensor([0, 1])}
    vectors = noise(1, 2, 16, SIZE // 2, SIZE // 2)  # a row an item
    shift = Direction(vectors, (1.0,)).shift(1.5)
    outcomes = [
        cfg(3.0, batched=batched)(shift(denoiser))(x, 0.5, Context.of(2, None, cond=cond)).native
        for batched in (True, False)
    ]
    assert torch.allclose(outcomes[0], outcomes[1], atol=1e-12)
    seen: list[Tensor] = []
    ctx = Context.of(2, None, cond=cond, taps=(("level.up", lambda c, call, h, *a: (seen.append(h), call(h, *a))[1]),))
    _, plain = inside.features(denoiser, x, 0.5, Context.of(2, None, cond=cond), ["level.deep.deep"])
    watched = ("level.deep.up", lambda c, call, h, *a: (seen.append(h), call(h, *a))[1])
    shift(denoiser)(x, 0.5, Context.of(2, None, cond=cond, taps=(watched,)))
    assert torch.allclose(seen[-1], plain["level.deep.deep"] + 1.5 * vectors[0]) and ctx.taps


def test_asymmetric_keeps_the_plain_direction_to_the_noise():
    denoiser, x = unet(), noise(2, 1, SIZE, SIZE)
    direction = Direction(noise(1, 16, SIZE // 2, SIZE // 2), (1.0,))
    ctx = Context.of(2, None)
    plain, edited = denoiser(x, 0.5, ctx), direction.shift(2.0)(denoiser)(x, 0.5, ctx)
    both = direction.shift(2.0, asymmetric=True)(denoiser)(x, 0.5, ctx)
    assert torch.allclose(both.mean, edited.mean) and torch.allclose(both.view("eps"), plain.view("eps"))
    assert ctx.run.nfe == 4


@pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_item_i_never_depends_on_the_batch(process: Any, dtype: torch.dtype):
    denoiser = unet(process, dtype=dtype)
    direction = Direction(noise(2, 16, SIZE // 2, SIZE // 2, dtype=dtype), (0.8, 0.3))
    x = noise(3, 1, SIZE, SIZE, dtype=dtype)
    shifted = direction.shift(1.0)(denoiser)
    whole = sf.sample(shifted, solver="ddpm", grid="uniform", steps=3, x=x, seed=[5, 6, 7])
    alone = sf.sample(shifted, solver="ddpm", grid="uniform", steps=3, x=x[1:2], seed=[6])
    assert whole.dtype == dtype and torch.allclose(whole[1:2], alone, atol=1e-5 if dtype == torch.float32 else 1e-12)
    if dtype == torch.float32:
        few, more = (
            collect(denoiser, steps=3, n=n, shape=(1, SIZE, SIZE), seed=4, batch=b) for n, b in ((3, 2), (5, 5))
        )
        assert torch.allclose(few.h, more.h[:, :3], rtol=1e-3, atol=1e-4 * float(few.h.abs().max()))


def test_directions_between_and_beyond_their_times():
    v = noise(3, 4)
    direction = Direction(v, (0.9, 0.5, 0.1))
    assert torch.equal(direction.at(0.9), v[0]) and torch.equal(direction.at(0.5), v[1])
    assert torch.allclose(direction.at(0.6), 0.75 * v[1] + 0.25 * v[0])
    assert torch.equal(direction.at(1.0), v[0]) and torch.equal(direction.at(0.0), v[2])
    assert torch.equal(Direction(v[:1], (0.4,)).at(0.77), v[0])
    for times in ((0.1, 0.5, 0.9), (0.5, 0.5, 0.1), (0.5, 0.1)):
        with pytest.raises(InputError):
            Direction(v, times)


# ------------------------------------------------------------------ collecting and statistics


def test_collecting_is_the_plain_trajectory_with_its_features():
    denoiser = unet()
    latents = collect(denoiser.float(), steps=4, n=3, shape=(1, SIZE, SIZE), seed=2)
    solver, grid = solvers.get("ddpm"), grids.get("uniform")
    with torch.no_grad():
        steps = list(trajectory(denoiser, solver, grid, 4, shape=(3, 1, SIZE, SIZE), seed=2))
        assert torch.equal(latents.start, steps[0].x) and torch.equal(latents.x0, steps[-1].x)
        assert latents.times == tuple(s.t for s in steps[:-1])
        for i, s in enumerate(steps[:-1]):
            _, found = inside.features(denoiser, s.x, s.t, Context.of(3, None), [latents.path])
            assert torch.equal(found[latents.path], latents.h[i])
    with pytest.raises(InputError, match="n="):
        collect(denoiser, steps=2)


def latents(h: Tensor) -> Latents:
    times = tuple(1 - i / len(h) for i in range(len(h)))
    return Latents(h, times, "level.deep.deep", h[0], h[0])


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(5, 12), st.integers(2, 30))
def test_principal_components_are_those_of_an_independent_implementation(seed: int, times: int, n: int, size: int):
    from sklearn.decomposition import PCA

    k = min(3, n - 1, size)
    h = noise(times, n, size, seed=seed)
    found = torch.stack([d.vectors for d in principal(latents(h), k)])
    for i in range(times):
        reference = PCA(k).fit(h[i].numpy())
        ours = found[:, i]
        assert torch.allclose(ours.norm(dim=1), torch.from_numpy(reference.explained_variance_).sqrt(), rtol=1e-6)
        cosine = (ours / ours.norm(dim=1, keepdim=True) * torch.from_numpy(reference.components_)).sum(1)
        assert torch.allclose(cosine.abs(), torch.ones(k, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(ours @ ours.T, torch.diag((ours @ ours.T).diag()), atol=1e-8 * float(ours.square().sum()))
    assert bool(((found[:, 1:] * found[:, :-1]).sum(-1) >= 0).all()), "signs agree from time to time"


def test_joint_components_are_those_of_all_times_side_by_side():
    h = noise(3, 9, 4, 2)
    joint = torch.stack([d.vectors for d in principal(latents(h), 2, joint=True)]).flatten(1)
    wide = h.transpose(0, 1).reshape(9, -1)
    _, s, vh = torch.linalg.svd(wide - wide.mean(0), full_matrices=False)
    assert torch.allclose(joint.norm(dim=1), s[:2] / 8**0.5)
    assert torch.allclose(
        (joint / joint.norm(dim=1, keepdim=True) * vh[:2]).sum(1).abs(), torch.ones(2, dtype=torch.float64)
    )
    with pytest.raises(InputError, match="components"):
        principal(latents(h), 9)


def test_a_difference_within_strata_is_blind_to_the_confounder():
    n, size = 40, 6
    a = torch.arange(n) % 5 == 0
    b = torch.where(noise(n).abs() < 0.8, a, ~a)  # b goes with a most of the time
    u, w = noise(size, seed=1), noise(size, seed=2)
    h = (a[:, None] * u + b[:, None] * w)[None]
    plain, fair = mean_difference(latents(h), a), mean_difference(latents(h), a, b.long())
    assert torch.allclose(fair.vectors[0], u) and not torch.allclose(plain.vectors[0], u, atol=0.1)
    with pytest.raises(InputError, match="stratum"):
        mean_difference(latents(h), a, a.long())
    with pytest.raises(InputError, match="one each"):
        mean_difference(latents(h), a[:-1])


@given(st.integers(0, 10_000), st.integers(1, 3))
def test_projection_leaves_nothing_of_the_others_and_the_rest_alone(seed: int, m: int):
    h = latents(noise(2, 3, 5, seed=seed))
    v = Direction(h.h[:, 0], h.times, h.path)
    others = [Direction(noise(2, 5, seed=seed + 1 + i), h.times) for i in range(m)]
    left = project_out(v, [*others, others[0]])  # also where they depend on each other
    for i in range(2):
        confounders = torch.stack([o.vectors[i] for o in others])
        assert float((confounders @ left.vectors[i]).abs().max()) < 1e-9
        gone = v.vectors[i] - left.vectors[i]
        assert float((gone @ left.vectors[i]).abs()) < 1e-9
    twice = project_out(left, others)
    assert torch.allclose(twice.vectors, left.vectors, atol=1e-9)


def test_a_random_control_has_the_same_lengths_and_one_orientation():
    v = Direction(noise(3, 4, 2), (0.9, 0.5, 0.1), "level")
    control = random_like(v, 3)
    assert torch.allclose(control.norms, v.norms) and control.path == "level"
    unit = control.vectors.flatten(1) / control.norms[:, None]
    assert torch.allclose(unit[0], unit[2]) and not torch.allclose(random_like(v, 4).vectors, control.vectors)


# ------------------------------------------------------------------ spectra


def test_subspace_iteration_is_the_singular_value_decomposition_also_of_clusters():
    left, right = (torch.linalg.qr(noise(2, 9, 9, seed=s)).Q for s in (1, 2))
    values = torch.tensor(
        [[3.0, 3.0, 2.9, 1.0, 0.5, 0.1, 0, 0, 0], [5.0, 1, 0.4, 0.3, 0.2, 0.1, 0.1, 0, 0]], dtype=torch.float64
    )
    j = left @ torch.diag_embed(values) @ right.transpose(1, 2)
    found = singular_vectors(lambda v: v @ j.transpose(1, 2), lambda u: u @ j, noise(2, 5, 9, seed=3), 3, 30)
    assert torch.allclose(found.values, values[:, :3], rtol=1e-6)
    assert torch.allclose(
        (j @ found.right.transpose(1, 2)), found.left.transpose(1, 2) * found.values[:, None], atol=1e-6
    )
    for vectors in (found.right, found.left):
        assert torch.allclose(
            vectors @ vectors.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand(2, 3, 3), atol=1e-9
        )
    assert float(found.residual.max()) < 1e-5
    with pytest.raises(InputError):
        singular_vectors(lambda v: v, lambda u: u, noise(1, 2, 4), 3, 5)


@pytest.mark.parametrize("make", [unet, dit])
@pytest.mark.parametrize("masked", [False, True])
def test_directions_of_an_image_are_the_singular_vectors_of_the_explicit_jacobian(make: Any, masked: bool):
    denoiser, x, t = make(), noise(2, 1, SIZE, SIZE), 0.6
    mask = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64) if masked else None
    if mask is not None:
        mask[..., 2:6, 1:5] = 1
    found = jacobian_directions(denoiser, x, t, 2, mask=mask, iterations=16, extra=6)
    path = inside.bottleneck(denoiser)
    _, h = inside.features(denoiser, x, t, Context.of(2, None), [path])

    def belief(shift: Tensor, i: int) -> Tensor:
        tap = inside.changing(path, lambda out: out + shift)
        return denoiser(x[i : i + 1], t, Context.of(1, None, taps=(tap,))).mean * (1 if mask is None else mask)

    for i in range(2):
        j = torch.autograd.functional.jacobian(lambda s, i=i: belief(s, i), torch.zeros_like(h[path][i : i + 1]))
        u, s, vh = torch.linalg.svd(j.reshape(SIZE * SIZE, -1), full_matrices=False)
        assert torch.allclose(found.values[i], s[:2], rtol=1e-4)
        assert torch.allclose(
            (found.right[i].flatten(1) * vh[:2]).sum(1).abs(), torch.ones(2, dtype=torch.float64), atol=1e-4
        )
        assert torch.allclose(
            (found.left[i].flatten(1) * u.T[:2]).sum(1).abs(), torch.ones(2, dtype=torch.float64), atol=1e-4
        )
    one = jacobian_directions(denoiser, x[:1], t, 2, mask=mask, iterations=16, extra=6)
    assert torch.allclose(one.right, found.right[:1], atol=1e-8), "item i never depends on the batch"
    with pytest.raises(InputError, match="mask is empty"):
        jacobian_directions(denoiser, x, t, mask=torch.zeros(1, 1, SIZE, SIZE))


def test_pictures_of_several_channels_are_differentiated_too():
    """Their maps are channels-last, for which fused normalisation has no forward-mode derivative."""
    torch.manual_seed(0)
    net = UNet(3, width=8, multipliers=(1, 2), blocks=1, attention=(False, True), heads=2)
    denoiser, x = parametrized(awake(net, torch.float64), VP(), "v"), noise(1, 3, SIZE, SIZE)
    found = jacobian_directions(denoiser, x, 0.6, 1, path="level.deep", iterations=4)
    step, ctx = 1e-5, Context.of(1, None)
    moved = [
        Direction(found.right[:, 0][None], (1.0,), "level.deep").shift(s)(denoiser)(x, 0.6, ctx).mean.detach()
        for s in (step, -step)
    ]
    assert abs(float((moved[0] - moved[1]).norm() / (2 * step)) / float(found.values) - 1) < 1e-4


def test_a_foreign_network_gives_directions_too():
    pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    pipe = sf.from_diffusers(tiny.pipeline("sd"))
    x, cond = noise(2, *pipe.codec.shape(*pipe.size), dtype=torch.float32), pipe.conditions(2, ["a", "b"])
    found = jacobian_directions(pipe.denoiser, x, 0.6, 1, cond=cond, reading="eps")
    eps = 1e-2
    _, h = inside.features(
        pipe.denoiser, x, 0.6, Context.of(2, None, cond=cond), [path := inside.bottleneck(pipe.denoiser)]
    )
    moved = [
        internal(lambda h, t, sign=sign: h + sign * eps * found.right[:, 0])(pipe.denoiser)(
            x, 0.6, Context.of(2, None, cond=cond)
        ).view("eps")
        for sign in (1, -1)
    ]
    slope = (moved[0] - moved[1]).detach().flatten(1).norm(dim=1) / (2 * eps)
    assert torch.allclose(slope, found.values[:, 0], rtol=0.02) and h[path].shape[1:] == found.right.shape[2:]


# ------------------------------------------------------------------ the edit


def test_an_edit_of_nothing_gives_the_image_back():
    model = sf.load("digits")
    x, cond = torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1, model.conditions(2)
    task = editing.Task(
        denoiser=model.denoiser, codec=model.codec, x0=x, images=torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8),
        source=cond, target=cond, guidance=lambda d: d, scale=1.0, solver=solvers.get("ddim"),
        grid=grids.get("uniform"), steps=6,
    )  # fmt: skip
    masked = task.but(mask=torch.ones(2, 1, SIZE, SIZE))
    one = masked.but(x0=x[:1], source=model.conditions(1), mask=torch.ones(1, 1, SIZE, SIZE))
    with torch.no_grad():
        h = collect(model.denoiser, steps=1, n=1, shape=(1, SIZE, SIZE), cond=model.conditions(1)).h
        direction = Direction(torch.randn_like(h[:, 0]), (1.0,))
        still = editing.get("h-space", direction=direction, scale=0.0)(task)
        assert torch.allclose(still, x, atol=1e-4) and task.nfe[0] == 12
        plain = editing.get("edit-friendly", strength=1.0, source_guidance=1.0)(task)
        assert torch.equal(still, plain), "the recorded trajectory itself"
        moved = editing.get("h-space", scale=1.0)(masked)
        assert moved.shape == x.shape and not torch.allclose(moved, plain, atol=1e-3)
        assert torch.allclose(editing.get("h-space", scale=1.0)(one), moved[:1], atol=1e-3)
        with pytest.raises(InputError, match="leave out"):
            editing.get("h-space", direction=direction)(masked)
    for numbers in ({"strength": 0.0}, {"component": -1}, {"at": 0.0}):
        with pytest.raises(InputError):
            editing.get("h-space", **numbers)


def test_data_noised_at_every_time_is_what_an_edit_friendly_record_visits():
    denoiser, x = unet(), noise(3, 1, SIZE, SIZE)
    found = collect_noised(denoiser, x, steps=4, seed=3, batch=2)
    assert found.times == (1.0, 0.75, 0.5, 0.25) and torch.equal(found.x0, x)
    ctx = Context.of(3, 3, dtype=x.dtype)
    for i, t in enumerate(found.times):
        state, _ = denoiser.process.corrupt(x, t, ctx)
        _, h = inside.features(denoiser, state, t, Context.of(3, None), [found.path])
        assert torch.allclose(h[found.path], found.h[i], atol=1e-10)
    assert torch.equal(found.noise.h[0], found.start) and found.noise.times == (1.0,)


def test_the_front_door_of_a_stable_diffusion_pipeline():
    pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    pipe = sf.from_diffusers(tiny.pipeline("sd"))
    image = torch.randint(0, 255, (1, 3, *pipe.size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = sf.edit(pipe, image, method="h-space", source="a", scale=0.0, steps=3)
    moved = sf.edit(pipe, image, method="h-space", source="a", scale=5.0, steps=3)
    numbers = {"strength": 1.0, "source_guidance": 1.0, "guidance": 1.0, "steps": 3}
    assert torch.equal(kept, sf.edit(pipe, image, "a", method="edit-friendly", source="a", **numbers))
    assert kept.shape == moved.shape == image.shape and not torch.equal(kept, moved)
    with pytest.raises(InputError, match="does not use prompt"):
        sf.edit(pipe, image, "b", method="h-space")
