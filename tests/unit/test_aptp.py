"""Gates, smaller networks, routers, codes and routed denoisers."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import sfumato as sf
from sfumato import networks, processes
from sfumato.acceleration import operations
from sfumato.acceleration.pruning import by_magnitude, gating, materialize, structure
from sfumato.acceleration.routing import PromptRouter, Routed, architecture, relaxed, removal, sinkhorn
from sfumato.acceleration.tailoring import PromptPruning, likeness
from sfumato.core import Context, InputError, Streams
from sfumato.guidance import cfg
from sfumato.objectives import Denoising
from sfumato.training import Trainer
from sfumato.training.data import Arrays, Batches

SHAPE, TOKENS = (2, 8, 8), 5


def denoiser(modulation="shared", text=True, process=None):
    torch.manual_seed(0)
    told = {"context_channels": 12, "vector_channels": 10} if text else {"vector_channels": 10}
    net = networks.DiT(2, size=8, patch=2, width=64, depth=4, heads=4, mlp_ratio=3, modulation=modulation, **told)
    for p in net.parameters():
        p.data = p.data + 0.05 * torch.randn_like(p)
    null = {"text": 0.0, "text_mask": False, "vector": 0.0} if text else {"vector": 0.0}
    return sf.parametrized(net.eval().requires_grad_(False), process or processes.Cosine(), "v", null=null)


def conditions(n, text=True, seed=1):
    g = torch.Generator().manual_seed(seed)
    vector = torch.randn(n, 10, generator=g)
    more = {
        "text": torch.randn(n, TOKENS - 1, 12, generator=g),
        "text_mask": torch.ones(n, TOKENS - 1, dtype=torch.bool),
    }
    return {"vector": vector, **(more if text else {})}


def codes(shape, n, seed=2, share=0.5):
    gates = (torch.rand(n, shape.size, generator=torch.Generator().manual_seed(seed)) < share).float()
    blocks, _ = shape.split(gates)
    for block in blocks:
        for part in block.values():
            part[:, 0] = 1  # a view: each part keeps one
    return gates


def call(d, x, cond, t=0.4, taps=()):
    with torch.no_grad():
        return d(x, t, Context(cond=cond, batch=len(x), taps=tuple(taps))).native


def unet():
    torch.manual_seed(0)
    net = networks.UNet(2, width=32, multipliers=(1, 2), blocks=1, attention=(False, True), context_channels=12, vector_channels=10)  # fmt: skip
    for p in net.parameters():
        p.data = p.data + 0.05 * torch.randn_like(p)
    null = {"text": 0.0, "text_mask": False, "vector": 0.0}
    return sf.parametrized(net.eval().requires_grad_(False), processes.Cosine(), "v", null=null)


def foreign():
    """A diffusers U-Net with text."""
    pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    pipe = sf.from_diffusers(tiny.pipeline("sd"))
    cond = pipe.conditions(3, ["a", "b", "c"])
    return pipe.denoiser.requires_grad_(False), pipe.codec.shape(*pipe.size), cond


@pytest.mark.parametrize("kind", ["unet", "diffusers"])
def test_u_nets_are_cut_to_the_function_and_the_cost_of_their_gates(kind):
    d, event, cond = (unet(), SHAPE, conditions(3)) if kind == "unet" else foreign()
    shape = structure(d, event, cond, group=8)
    x, one = torch.randn(3, *event), {k: v[:1] for k, v in cond.items()}
    names = {name for block in shape.widths for name in block}
    assert {"channels", "attention", "cross"} <= names and ("mlp" in names) == (kind == "diffusers")
    assert not bool(shape.whole.all()) or kind == "unet"
    whole = operations(lambda: call(d, x[:1], one))
    assert whole == pytest.approx(2 * shape.total, rel=1e-6)
    torch.testing.assert_close(call(d, x, cond, taps=gating(shape, torch.ones(3, shape.size))), call(d, x, cond), atol=1e-5, rtol=1e-4)  # fmt: skip
    before = {k: v.clone() for k, v in d.state_dict().items()}
    for gates in codes(shape, 3):
        gates[-len(shape.sites) :][~shape.whole] = 1
        small = materialize(d, shape, gates)
        torch.testing.assert_close(call(small, x, cond), call(d, x, cond, taps=gating(shape, gates.expand(3, -1))), atol=1e-4, rtol=1e-3)  # fmt: skip
        assert operations(lambda: call(small, x[:1], one)) / whole == pytest.approx(float(shape.cost(gates)), abs=1e-6)  # noqa: B023
    assert all(torch.equal(v, before[k]) for k, v in d.state_dict().items())
    assert 0.7 < float(shape.cost(by_magnitude(d, shape, 0.8))) <= 0.8
    if not bool(shape.whole.all()):
        gates = relaxed(torch.full((2, shape.size), -20.0), shape)
        assert bool((gates[:, -len(shape.sites) :][:, ~shape.whole].round() == 1).all())
        with pytest.raises(InputError, match="cannot be left out"):
            materialize(d, shape, torch.cat([torch.ones(shape.size - len(shape.sites)), torch.zeros(len(shape.sites))]))


@pytest.mark.parametrize("modulation", ["shared", "block"])
@pytest.mark.parametrize("text", [True, False])
def test_a_cut_network_is_the_gated_one(modulation, text):
    d = denoiser(modulation, text)
    shape = structure(d, SHAPE, conditions(1, text))
    x, cond = torch.randn(3, *SHAPE), conditions(3, text)
    before = {k: v.clone() for k, v in d.state_dict().items()}
    for gates in codes(shape, 4):
        small = materialize(d, shape, gates)
        torch.testing.assert_close(call(small, x, cond), call(d, x, cond, taps=gating(shape, gates.expand(3, -1))), atol=1e-5, rtol=1e-5)  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in d.state_dict().items())


def test_open_gates_change_nothing_and_items_have_their_own():
    d = denoiser()
    shape = structure(d, SHAPE, conditions(1))
    x, cond = torch.randn(3, *SHAPE), conditions(3)
    torch.testing.assert_close(call(d, x, cond, taps=gating(shape, torch.ones(3, shape.size))), call(d, x, cond))
    gates = codes(shape, 3)
    together = call(d, x, cond, taps=gating(shape, gates))
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in cond.items()}
        torch.testing.assert_close(call(d, x[i : i + 1], one, taps=gating(shape, gates[i : i + 1])), together[i : i + 1], atol=1e-5, rtol=1e-4)  # fmt: skip


@pytest.mark.parametrize("text", [True, False])
def test_the_cost_is_what_the_operations_of_the_cut_network_say(text):
    d = denoiser(text=text)
    shape = structure(d, SHAPE, conditions(1, text))
    x, cond = torch.randn(1, *SHAPE), conditions(1, text)

    def work(e):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return operations(lambda: call(e, x, cond))

    whole = work(d)
    assert whole == pytest.approx(2 * shape.total, rel=0.01)
    for gates in codes(shape, 3):
        assert work(materialize(d, shape, gates)) / whole == pytest.approx(float(shape.cost(gates)), abs=0.01)
    assert float(shape.cost(torch.ones(shape.size))) == pytest.approx(1.0)


def test_magnitude_pruning_meets_its_cost_and_closes_the_dead_first():
    d = denoiser()
    shape = structure(d, SHAPE, conditions(1))
    net = d.net
    net.blocks[1].mlp.out.weight.data[:, :32] = 0
    gates = by_magnitude(d, shape, 0.97)
    assert shape.split(gates)[0][1]["mlp"][0] == 0
    gates = by_magnitude(d, shape, 0.7)
    assert 0.6 < float(shape.cost(gates)) <= 0.7
    with pytest.raises(InputError, match="cannot be reached"):
        by_magnitude(d, shape, 0.01)


def test_relaxed_gates_are_hard_in_value_soft_in_gradient_and_never_leave_a_part_empty():
    shape = structure(denoiser(), SHAPE, conditions(1))
    logits = (6 * torch.randn(8, shape.size) - 6).requires_grad_()
    gates = relaxed(logits, shape)
    values = gates.detach().round()
    torch.testing.assert_close(values, gates.detach(), atol=1e-6, rtol=0)
    blocks, depth = shape.split(values)
    assert all(bool((part.sum(-1) >= 1).all()) for block in blocks for part in block.values())
    gates.sum().backward()
    assert float(logits.grad.abs().sum()) > 0 and torch.isfinite(logits.grad).all()
    order = removal(4)
    assert order[0] in (1, 2) and set(order[2:]) == {0, 3}
    closed = depth[:, order]  # in the order of removal a closed block never follows an open one
    assert bool((closed[:, 1:] >= closed[:, :-1]).all())


def test_transport_shares_items_evenly_and_keeps_clear_preferences():
    scores = torch.zeros(40, 4)
    scores[:, 0] = 1.0
    scores += 0.02 * torch.rand(40, 4)
    plan = sinkhorn(scores, iterations=50)
    torch.testing.assert_close(plan.sum(1), torch.ones(40))
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 10.0), atol=1e-3, rtol=1e-3)
    assert len(scores.argmax(1).unique()) == 1 and len(plan.argmax(1).unique()) == 4
    clear = torch.eye(4).repeat(5, 1)
    assert torch.equal(sinkhorn(clear).argmax(1), clear.argmax(1))
    ot = pytest.importorskip("ot")
    exact = ot.sinkhorn([1 / 40] * 40, [1 / 4] * 4, -scores.double().numpy(), 0.05)
    torch.testing.assert_close(plan.double() / 40, torch.as_tensor(exact), atol=1e-5, rtol=1e-3)


def routed(seed=0, d=None):
    d = denoiser() if d is None else d
    shape = structure(d, SHAPE, conditions(1))
    router = PromptRouter(10, shape, experts=3, seed=seed)
    router.book.data = torch.randn(3, shape.size, generator=torch.Generator().manual_seed(5)) / 2 - 0.5
    return Routed.of(d, router)


def test_a_batch_is_split_by_expert_and_put_together():
    r = routed()
    x, cond = torch.randn(6, *SHAPE), conditions(6)
    told = r.told(cond)
    whole, t = call(r, x, told, t=torch.linspace(0.1, 0.9, 6, dtype=torch.float64)), torch.linspace(0.1, 0.9, 6)
    for i in range(6):
        one = {k: v[i : i + 1] for k, v in cond.items()}
        expert = r.experts[int(told["expert"][i])]
        torch.testing.assert_close(call(expert, x[i : i + 1], one, t=float(t.double()[i])), whole[i : i + 1], atol=1e-4, rtol=1e-3)  # fmt: skip
    assert torch.equal(call(r, x, told), call(r, x, cond))
    chosen = {**cond, "expert": torch.full((6,), 2)}
    torch.testing.assert_close(call(r, x, chosen), call(r.experts[2], x, cond))


def test_both_halves_of_guidance_use_the_experts_of_the_prompts():
    r = routed()
    told = r.told(conditions(6))
    told["expert"] = torch.arange(6) % 3
    x, seen = torch.randn(6, *SHAPE), {}
    for e, expert in enumerate(r.experts):
        expert.register_forward_hook(lambda m, args, out, e=e: seen.setdefault(e, []).append(len(args[0])))
    ctx = Context(cond=told, batch=6)
    with torch.no_grad():
        cfg(2.0)(r)(x, 0.5, ctx)
    assert {e: sum(n) for e, n in seen.items()} == {0: 4, 1: 4, 2: 4}
    assert ctx.run.nfe == pytest.approx(2)


def test_routed_sampling_is_alike_alone_in_batches_and_threads():
    r = routed()
    told = r.told(conditions(4))

    def run(n=4, seed=1):
        given = {k: v[:n] for k, v in told.items()}
        with torch.no_grad():
            return sf.sample(cfg(2.0)(r), solver="dpm-solver++", steps=3, shape=(n, *SHAPE), cond=given, seed=seed)

    torch.testing.assert_close(run(1), run()[:1], atol=1e-4, rtol=1e-3)
    alone, found = [run(seed=s) for s in (1, 2)], {}
    threads = [threading.Thread(target=lambda s=s: found.update({s: run(seed=s)})) for s in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[s], alone[s - 1]) for s in (1, 2))


@pytest.mark.parametrize("tune", [False, True])
def test_training_meets_its_budget_and_leaves_the_teacher(tune):
    d = denoiser()
    before = {k: v.clone() for k, v in d.state_dict().items()}
    shape = structure(d, SHAPE, conditions(1))
    router = PromptRouter(10, shape, experts=3)
    student = copy.deepcopy(d).requires_grad_() if tune else d
    objective = PromptPruning(student, router, target=0.6, warmup=10)
    objective = PromptPruning(student, router, target=0.6, warmup=10, tune=tune)
    fields = {"x": torch.randn(24, *SHAPE), **conditions(24)}
    data = Batches(Arrays(fields), 12, 0, cond=("vector", "text", "text_mask"), prefetch=False)
    made = Trainer(objective, data, steps=60, lr={"router": 0.03, **({"student": 1e-4} if tune else {})}, ema=0, cpu=True, progress=False).fit()  # fmt: skip
    del made
    index = router.assign(fields["vector"])
    cost = float(shape.cost(router.gates())[index].mean())
    assert 0.4 < cost < 0.8
    assert all(torch.equal(v, before[k]) for k, v in d.state_dict().items())


def test_experts_learn_together_on_their_own_prompts():
    r = routed()
    r.requires_grad_(True)
    x, cond = torch.randn(8, *SHAPE), r.told(conditions(8))
    loss = Denoising(r, dropout=0.1)({"x": x, "cond": cond}, Context(rng=Streams.of(0, 8), batch=8))
    loss.total.backward()
    used = set(cond["expert"].tolist())
    for e, expert in enumerate(r.experts):
        assert any(p.grad is not None for p in expert.parameters()) == (e in used)


def test_likeness_is_least_where_architectures_are_as_alike_as_prompts():
    z = torch.nn.functional.normalize(torch.randn(12, 30), dim=-1)
    assert float(likeness(z, z)) <= min(float(likeness(z[torch.randperm(12)], z)) for _ in range(5))
    shape = structure(denoiser(), SHAPE, conditions(1))
    open_ = torch.cat([codes(shape, 5)[:, :-4], torch.ones(5, 4)], 1)
    u = architecture(open_, shape)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(5))


def test_refusals():
    d = denoiser()
    shape = structure(d, SHAPE, conditions(1))
    mlp = networks.MLP(2, 16, depth=2)
    for call_, said in [
        (lambda: structure(sf.parametrized(mlp, processes.VP(), "eps"), (2,)), "no block"),
        (lambda: structure(d, SHAPE, conditions(1), group=7), "groups of 7"),
        (lambda: materialize(d, shape, torch.ones(3)), "wanted"),
        (lambda: materialize(d, shape, torch.full((shape.size,), 0.5)), "0 or 1"),
        (lambda: materialize(d, shape, torch.cat([torch.zeros(shape.size - 4), torch.ones(4)])), "keeps nothing"),
        (lambda: sinkhorn(torch.zeros(3, 4)), "3 items for 4"),
        (lambda: PromptRouter(10, shape, experts=0), "at least one"),
        (lambda: PromptPruning(d, PromptRouter(10, shape), target=0.001), "in no gate"),
        (lambda: Routed([d], PromptRouter(10, shape, experts=2)), "1 experts"),
        (lambda: routed().told({}), "reads 'vector'"),
    ]:
        with pytest.raises(InputError, match=said):
            call_()


def test_codes_gather_at_evenly_shared_groups_of_prompts():
    shape = structure(denoiser(), SHAPE, conditions(1))
    router = PromptRouter(10, shape, experts=3, seed=1)
    middles = torch.nn.functional.normalize(torch.randn(3, 10, generator=torch.Generator().manual_seed(3)), dim=-1)
    kind = torch.arange(60) % 3
    z = middles[kind] + 0.02 * torch.randn(60, 10, generator=torch.Generator().manual_seed(4))
    router.gather(z)
    groups = torch.stack([router(z)[kind == k].mean(0) for k in range(3)])
    near = torch.cdist(router.codes, groups).detach()
    assert sorted(near.argmin(1).tolist()) == [0, 1, 2] and float(near.amin(1).max()) < 1e-4
    with pytest.raises(InputError, match="2 items for 3"):
        router.gather(z[:2])


def test_few_items_go_through_the_networks_and_all_through_the_other_terms():
    d, n = denoiser(), 12
    shape = structure(d, SHAPE, conditions(1))
    seen: list[int] = []
    d.net.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    batch = {"x": torch.randn(n, *SHAPE), "cond": conditions(n)}
    found = {}
    for items in (None, (0, 5)):
        router = PromptRouter(10, shape, experts=3, seed=1)
        objective = PromptPruning(d, router, warmup=4, items=items, begin="prompts")
        for step in (0, 4):
            ctx = Context.of(n, 7)
            ctx.run.step = step
            objective(batch, ctx).total.backward()
            found[items, step] = objective(batch, ctx).terms
        assert router.book.grad is not None and float(router.book.grad.abs().sum()) > 0
    assert seen == [12] * 8 + [5] * 4  # student and full, twice a step
    assert float(found[(0, 5), 0]["denoising"]) == 0 < float(found[(0, 5), 4]["denoising"])
    assert found[None, 0]["alike"] == found[(0, 5), 0]["alike"] and found[None, 0]["kept"] == found[(0, 5), 0]["kept"]


def test_refusals_of_beginnings():
    d = denoiser()
    router = PromptRouter(10, structure(d, SHAPE, conditions(1)))
    for options, said in [({"begin": "odd"}, "'book' or"), ({"items": (-1, 2)}, "two numbers"), ({"begin": "prompts", "transport": False}, "transport")]:  # fmt: skip
        with pytest.raises(InputError, match=said):
            PromptPruning(d, router, **options)
