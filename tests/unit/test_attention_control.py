"""Attention control: opening the kernel changes nothing, what is replaced is the source's, and rows never mix."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from tiny_text import lively
from tiny_text import text_unet as unet

import sfumato as sf
from sfumato import editing, grids, networks, solvers
from sfumato.core import Context, InputError, trajectory
from sfumato.editing.attention import (
    Control,
    Pair,
    Record,
    Recorded,
    RecordKeys,
    Replace,
    Reweight,
    Share,
    Watch,
    controlled,
    recorded,
    sites,
    watched,
)
from sfumato.editing.methods.prompt_to_prompt import controls, couple
from sfumato.editing.words import alignment, attention_map, changed
from sfumato.guidance import cfg

PROMPTS = ["red heart", "cat face", "grinning face"]
TARGETS = ["blue heart", "dog face", "crying cat face"]


def dit() -> torch.nn.Module:
    torch.manual_seed(0)
    return lively(
        networks.build(
            "dit", {"channels": 2, "size": 6, "patch": 2, "width": 16, "depth": 2, "heads": 2, "context_channels": 8}
        )
    )


NETS = {"dit": dit, "unet": unet}


def denoiser(name: str, process: object | None = None) -> sf.core.Denoiser:
    null = {"text": 0.0, "text_mask": False}
    return sf.parametrized(NETS[name](), process or sf.processes.VP(), "eps", null=null)


def text(n: int, length: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(2, length + 1, (n, 1), generator=generator)
    return {"text": torch.randn(n, length, 8, generator=generator).double() * mask[..., None], "text_mask": mask}


def state(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(seed)).double()


def context(n: int, cond: dict[str, torch.Tensor]) -> Context:
    return Context.of(n, 0, cond=cond, dtype=torch.float64)


@dataclass(frozen=True)
class Nothing(Control):
    def __call__(self, at: object, own: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return own


@dataclass(frozen=True)
class Backwards(Control):
    """Tokens attended in reverse: something that is seen."""

    def __call__(self, at: object, own: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return own.flip(-2)


@pytest.mark.parametrize("name", NETS)
def test_the_opened_kernel_is_the_fused_one(name: str) -> None:
    d, x, cond = denoiser(name), state(3), text(3)
    plain = d(x, 0.5, context(3, cond)).native
    torch.testing.assert_close(controlled(d, Nothing())(x, 0.5, context(3, cond)).native, plain, rtol=1e-12, atol=1e-12)
    assert (controlled(d, Backwards())(x, 0.5, context(3, cond)).native - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("guided", [False, True])
def test_a_source_replaced_by_itself_is_the_identity(name: str, guided: bool) -> None:
    """Same latents and conditions in both branches: every control that copies the source changes rounding only."""
    d, x, cond, pair = denoiser(name), state(3), text(3), Pair(3)
    around = cfg(3.0) if guided else lambda inner: inner
    plain = around(d)(x, 0.5, context(3, cond)).native
    align = alignment(cond, cond)
    copies = (Replace("cross", align=align), Replace("self"), Share(), Share(joined=True))
    both = around(controlled(d, *copies, source=pair))(pair.join(x, x), 0.5, context(3, pair.join(cond, cond)))
    for half in pair.split(both.native):
        torch.testing.assert_close(half, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("guided", [False, True])
def test_fully_replaced_maps_are_those_of_the_source(name: str, guided: bool) -> None:
    d, pair, cond = denoiser(name), Pair(3), pair_of_texts()
    around = cfg(3.0) if guided else lambda inner: inner
    ctx = context(3, cond)
    both = controlled(d, Replace(), Watch(None), source=pair)
    around(both)(pair.join(state(3), state(3, seed=2)), 0.5, ctx)
    seen = watched(ctx)
    assert len(seen) == len(sites(d.net)) and watched(ctx) == []
    for _, maps in seen:
        source, target = maps.unflatten(0, (-1, 2, 3)).unbind(1)
        assert torch.equal(source, target)


def pair_of_texts(n: int = 3) -> dict[str, torch.Tensor]:
    return Pair(n).join(text(n), text(n, seed=7))


@pytest.mark.parametrize("name", NETS)
def test_the_source_branch_never_feels_the_target(name: str) -> None:
    d, pair, cond = denoiser(name), Pair(3), pair_of_texts()
    alone = d(state(3), 0.5, context(3, {k: v[:3] for k, v in cond.items()})).native
    act = (Replace(), Share(joined=True), Reweight(weights=torch.full((3, 5), 2.0)))
    both = controlled(d, *act, source=pair)(pair.join(state(3), state(3, seed=2)), 0.5, context(3, cond)).native
    torch.testing.assert_close(pair.split(both)[0], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
def test_items_do_not_depend_on_the_batch(name: str) -> None:
    d, cond = denoiser(name), pair_of_texts()
    act = (Replace("cross", stop=0.0, align=alignment(*Pair(3).split(cond))), Replace("self"))
    whole = Pair(3)
    x = whole.join(state(3), state(3, seed=2))
    all_rows = cfg(3.0)(controlled(d, *act, source=whole))(x, 0.5, context(3, cond)).native
    rows = torch.tensor([1, 4])
    one = (Replace("cross", stop=0.0, align=act[0].align[1:2]), act[1])
    part = {k: v[rows] for k, v in cond.items()}
    single = cfg(3.0)(controlled(d, *one, source=Pair(1)))(x[rows], 0.5, context(1, part)).native
    torch.testing.assert_close(single, all_rows[rows], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
def test_stacked_and_separate_guidance_are_controlled_alike(name: str) -> None:
    d, pair, cond = denoiser(name), Pair(3), pair_of_texts()
    both = controlled(d, Replace("cross", align=alignment(*pair.split(cond))), Share(), source=pair)
    x = pair.join(state(3), state(3, seed=2))
    stacked, apart = (cfg(3.0, batched=b)(both)(x, 0.5, context(3, cond)).native for b in (True, False))
    torch.testing.assert_close(stacked, apart, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("record, act", [(Record(), Replace()), (RecordKeys("self"), Share())], ids=["maps", "keys"])
def test_two_runs_are_two_branches(record: Control, act: Control) -> None:
    """The target of a second run with the recorded source is the target of the batched pair."""
    d, pair, solver, grid = denoiser("dit"), Pair(3), solvers.get("heun"), grids.get("uniform")
    cond = pair_of_texts()
    x = pair.join(state(3), state(3, seed=2))
    both = cfg(2.0)(controlled(d, act, source=pair))
    *_, last = trajectory(both, solver, grid, 4, x=x, stop=0.2, ctx=context(3, cond))
    halves = [{k: v[i : i + 3] for k, v in cond.items()} for i in (0, 3)]
    first, second = (context(3, half) for half in halves)
    list(trajectory(cfg(2.0)(controlled(d, record)), solver, grid, 4, x=x[:3], stop=0.2, ctx=first))
    replay = cfg(2.0)(controlled(d, act, source=Recorded(recorded(first))))
    *_, again = trajectory(replay, solver, grid, 4, x=x[3:], stop=0.2, ctx=second)
    torch.testing.assert_close(again.x, last.x[3:], rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match="recorded at t"):
        list(trajectory(replay, solver, grid, 5, x=x[3:], stop=0.2, ctx=context(3, halves[1])))


def test_windows_open_and_close() -> None:
    d, pair, cond = denoiser("dit"), Pair(3), pair_of_texts()
    x = pair.join(state(3), state(3, seed=2))
    plain = d(x, 0.5, context(3, cond)).native
    for window, same in (((1.0, 0.5), True), ((1.0, 0.4), False), ((0.4, 0.0), True), ((0.5, 0.0), False)):
        one = controlled(d, Replace("self", *window), source=pair)(x, 0.5, context(3, cond)).native
        assert torch.equal(one, plain) is same, window


def test_alignment_follows_words() -> None:
    """Swapped words take the place, inserted ones are new, masked ones match nothing."""
    words = torch.nn.functional.normalize(torch.eye(6).double() + 0.2, dim=-1)
    say = lambda *w: {"text": words[list(w)][None], "text_mask": torch.ones(1, len(w), dtype=torch.bool)}  # noqa: E731
    assert alignment(say(0, 1, 2, 5), say(0, 3, 2, 5)).tolist() == [[0, 1, 2, 3]]
    assert alignment(say(0, 2, 5), say(0, 3, 2, 5)).tolist() == [[0, -1, 1, 2]]
    assert alignment(say(0, 3, 2, 5), say(0, 2, 5)).tolist() == [[0, 2, 3]]
    short = say(0, 3, 2, 5)
    short["text_mask"][:, 3:] = False
    assert alignment(say(0, 3, 2, 5), short).tolist() == [[0, 1, 2, -1]]
    assert [m.tolist() for m in changed(say(0, 1, 2, 5), say(0, 3, 2, 5))] == [[[False, True, False, False]]] * 2
    old, new = changed(say(0, 2, 5), say(0, 3, 2, 5))
    assert not old.any() and new.tolist() == [[False, True, False, False]]


def test_real_captions_are_aligned() -> None:
    pipeline = sf.load("emoji-latent")
    cases = {
        ("heart suit", "broken heart"): None,
        ("grinning face", "grinning cat"): [0, 1, 2, 3],
        ("red heart", "blue heart"): [0, 1, 2, 3],
    }
    for (one, two), want in cases.items():
        index = alignment(pipeline.conditions(1, [one]), pipeline.conditions(1, [two]))[0].tolist()
        used = [i for i in index if i >= 0]
        assert used == sorted(set(used))  # monotone
        assert want is None or index[: len(want)] == want


def test_reweighting_acts_on_the_tokens_named() -> None:
    d, cond = denoiser("dit"), text(2)
    weights = torch.ones(2, 5)
    weights[:, 1] = 3.0
    ctx = context(2, cond)
    controlled(d, Watch(key="before"), Reweight(weights=weights), Watch(key="after"))(state(2), 0.5, ctx)
    for (_, before), (_, after) in zip(watched(ctx, "before"), watched(ctx, "after"), strict=True):
        want = before.clone()
        want[..., 2] *= 3  # a null token stands in front
        torch.testing.assert_close(after, want)


def test_maps_have_a_place() -> None:
    d, cond = denoiser("unet"), text(2)
    ctx = context(2, cond)
    cfg(2.0)(controlled(d, Watch()))(state(2), 0.5, ctx)
    seen = watched(ctx)
    chosen = cond["text_mask"]
    place = attention_map(seen, chosen, (6, 6))
    assert place.shape == (2, 1, 6, 6) and (place >= 0).all() and (place <= 1).all()
    one = attention_map([(p, m[:2]) for p, m in seen], chosen, (6, 6))
    assert torch.equal(one, place)  # the conditional rows come first


def test_threads_do_not_meet() -> None:
    """One controlled and one free run of the same network at the same time: each as if alone."""
    d, cond = denoiser("dit"), text(3)
    free, turned = (
        d(state(3), 0.5, context(3, cond)).native,
        controlled(d, Backwards())(state(3), 0.5, context(3, cond)).native,
    )
    wrong: list[str] = []

    def many(what: sf.core.Denoiser, want: torch.Tensor, who: str) -> None:
        for _ in range(30):
            if not torch.equal(what(state(3), 0.5, context(3, cond)).native, want):
                wrong.append(who)

    jobs = [(d, free, "free"), (controlled(d, Backwards()), turned, "turned")]
    threads = [threading.Thread(target=many, args=job) for job in jobs]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_gradients_pass_through() -> None:
    d, cond = denoiser("dit"), text(2)
    x = state(2).requires_grad_()
    ctx = context(2, cond)
    with torch.enable_grad():
        controlled(d, Watch())(x, 0.5, ctx)
        (slope,) = torch.autograd.grad(sum(m[..., 1].sum() for _, m in watched(ctx)), x)
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart"])
def test_diffusers_networks(kind: str) -> None:
    """The opened kernel is the plain one, and a source replaced by itself is the identity."""
    pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    made = sf.from_diffusers(tiny.pipeline(kind))
    n, pair = 2, Pair(2)
    source, target = (made.conditions(n, t[:n]) for t in (PROMPTS, TARGETS))
    x = torch.randn(n, *made.codec.shape(*made.size), generator=torch.Generator().manual_seed(0))
    plain = cfg(3.0)(made.denoiser)(x, 0.5, context(n, source)).native
    copies = (Replace("cross", align=alignment(source, source)), Replace("self"), Share(joined=True))
    both = cfg(3.0)(controlled(made.denoiser, *copies, source=pair))
    with torch.no_grad():
        same = both(pair.join(x, x), 0.5, context(n, pair.join(source, source))).native
        for half in pair.split(same):
            torch.testing.assert_close(half, plain, rtol=1e-4, atol=1e-5)
        ctx = context(n, pair.join(source, target))
        controlled(made.denoiser, Replace(), Watch(None), source=pair)(pair.join(x, 2 * x), 0.5, ctx)
    for _, maps in watched(ctx):
        assert torch.equal(*maps.unflatten(0, (-1, 2, n)).unbind(1))


def test_the_text_attention_of_an_ip_adapter() -> None:
    """Beside an IP-Adapter the maps are those of the text, and opening them changes nothing."""
    diffusers = pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    unet = (pipe := tiny.pipeline("sd")).unet
    torch.manual_seed(1)
    image = diffusers.models.embeddings.ImageProjection(
        cross_attention_dim=tiny.WIDTH, image_embed_dim=12, num_image_text_embeds=4
    )
    weights = {"proj.weight": image.image_embeds.weight, "proj.bias": image.image_embeds.bias}
    weights |= {"norm.weight": image.norm.weight, "norm.bias": image.norm.bias}
    layers, names = {}, [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for key, name in enumerate(names):
        size = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        layers[f"{2 * key + 1}.to_k_ip.weight"], layers[f"{2 * key + 1}.to_v_ip.weight"] = (
            torch.randn(2, size, tiny.WIDTH) * 0.3
        )
    unet._load_ip_adapter_weights([{"image_proj": weights, "ip_adapter": layers}], low_cpu_mem_usage=False)
    made = sf.from_diffusers(pipe)
    cond = made.conditions(1, ["a cat"], image_prompt=torch.randn(1, 1, 12))
    x, ctx = torch.randn(1, *made.codec.shape(*made.size)), context(1, cond)
    with torch.no_grad():
        plain = made.denoiser(x, 0.5, context(1, cond)).native
        torch.testing.assert_close(controlled(made.denoiser, Watch())(x, 0.5, ctx).native, plain, rtol=1e-4, atol=1e-5)
    assert all(maps.shape[-1] == cond["text"].shape[1] for _, maps in watched(ctx))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_joint_attention_is_refused(kind: str) -> None:
    pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    with pytest.raises(InputError, match="joint"):
        controlled(sf.from_diffusers(tiny.pipeline(kind)).denoiser, Watch())


def test_wrong_use_is_refused() -> None:
    d, cond = denoiser("dit"), text(3)
    with pytest.raises(InputError, match="source="):
        controlled(d, Replace())
    with pytest.raises(InputError, match="no attention"):
        controlled(d, Watch(), where="nowhere")
    with pytest.raises(InputError, match="0 networks"):
        controlled(sf.oracles.Gaussian(torch.zeros(2), torch.eye(2)).denoiser(sf.processes.VP()), Watch())
    with pytest.raises(InputError, match="pairs"):
        controlled(d, Replace("self"), source=Pair(2))(state(3), 0.5, context(3, cond))
    with pytest.raises(InputError, match="one clock"):
        controlled(d, Watch())(state(3), torch.full((3,), 0.5).double(), context(3, cond))
    with pytest.raises(InputError, match="kind"):
        Replace("both")
    with pytest.raises(InputError, match="stop"):
        Replace("self", 0.2, 0.4)
    with pytest.raises(InputError, match="text"):
        alignment({}, {})
    with pytest.raises(InputError, match="recorded"):
        recorded(context(3, cond))


@pytest.fixture(scope="module")
def emoji() -> tuple[sf.Pipeline, torch.Tensor]:
    from sfumato.zoo import emoji

    pipeline = sf.load("emoji-latent")
    data = emoji.load(64, split="train", vendors=("noto",))
    return pipeline, data.images[:2]


def test_prompt_to_prompt_at_zero_is_ddim_inversion(emoji: tuple[sf.Pipeline, torch.Tensor]) -> None:
    pipeline, images = emoji
    ask = {"source": PROMPTS[:2], "steps": 4, "guidance": 2.0}
    free = editing.perform(pipeline, images, TARGETS[:2], method="prompt-to-prompt", cross=0.0, structure=0.0, **ask)
    plain = editing.perform(pipeline, images, TARGETS[:2], method="ddim-inversion", **ask)
    torch.testing.assert_close(free.state, plain.state, rtol=1e-4, atol=1e-4)


def test_prompt_to_prompt_with_the_source_as_target_reconstructs_the_source(
    emoji: tuple[sf.Pipeline, torch.Tensor],
) -> None:
    pipeline, images = emoji
    ask = {"source": PROMPTS[:2], "steps": 4, "guidance": 2.0}
    same = editing.perform(pipeline, images, PROMPTS[:2], method="prompt-to-prompt", **ask)
    plain = editing.perform(pipeline, images, PROMPTS[:2], method="ddim-inversion", **ask)
    torch.testing.assert_close(same.state, plain.state, rtol=1e-3, atol=1e-3)


def test_control_keeps_the_source_and_blending_keeps_it_exactly(emoji: tuple[sf.Pipeline, torch.Tensor]) -> None:
    """More control, less change; what local blending leaves out is the source branch to the last bit."""
    pipeline, images = emoji
    task = task_of(pipeline, images)
    x = torch.randn(task.x0.shape, generator=torch.Generator().manual_seed(0))
    moved = {}
    for cross, structure in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)):
        source, target = couple(task, x, controls(task, cross, structure))
        moved[cross, structure] = (source - target).square().mean().item()
    assert moved[1.0, 1.0] < moved[1.0, 0.0] < moved[0.0, 0.0]
    source, target = couple(task, x, controls(task), blend=0.9)
    same = (source == target).all(1)
    assert same.any() and not same.all()


@pytest.mark.parametrize("solver", ["ddpm", "dpm-solver++", "heun"])
def test_both_branches_draw_the_same_noise(emoji: tuple[sf.Pipeline, torch.Tensor], solver: str) -> None:
    """From one state under one prompt they stay together with every solver, stochastic ones too."""
    task = task_of(*emoji)
    task = task.but(source=task.target, solver=solvers.get(solver))
    x = torch.randn(task.x0.shape, generator=torch.Generator().manual_seed(0))
    source, target = couple(task, x, controls(task))
    torch.testing.assert_close(source, target, rtol=1e-3, atol=1e-3)


def task_of(pipeline: sf.Pipeline, images: torch.Tensor) -> editing.Task:
    kept: list[editing.Task] = []

    class Keep(editing.Method):
        needs = frozenset({"prompt", "source"})

        def __call__(self, task: editing.Task) -> torch.Tensor:
            kept.append(task)
            return task.x0

    editing.perform(pipeline, images, TARGETS[:2], source=PROMPTS[:2], method=Keep(), steps=4, guidance=2.0)
    return kept[0]


def test_a_tiny_diffusers_pipeline_is_edited() -> None:
    pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    made = sf.from_diffusers(tiny.pipeline("sd"))
    image = torch.randint(0, 256, (1, 3, *made.size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ask = {"source": "a cat", "steps": 3, "guidance": 2.0, "method": "prompt-to-prompt"}
    out = editing.perform(made, image, "a dog", blend=0.3, **ask)
    assert out.state.isfinite().all() and out.images.shape == image.shape
    assert out.nfe == 3 * 1 + 3 * 4  # inversion; two branches with two readings each
