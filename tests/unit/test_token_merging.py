"""Token merging: the matching against its definition, exact where nothing merges, apart between items and runs, counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from two_threads import apart

import sfumato as sf
from sfumato import networks, processes
from sfumato.acceleration import operations, token_merging
from sfumato.acceleration.merging import grid_of, match
from sfumato.core import Context, InputError
from sfumato.guidance import cfg


def denoiser(name="dit"):
    torch.manual_seed(0)
    if name == "unet":
        net = networks.UNet(2, width=8, multipliers=(1, 2), blocks=1, attention=(False, True), embeddings={"y": 3})
    else:
        net = networks.DiT(2, size=8, patch=1, width=32, depth=3, heads=2, embeddings={"y": 3}, context_channels=6)
    for p in net.parameters():
        p.data = p.data + 0.05 * torch.randn_like(p)
    return sf.parametrized(net.eval().requires_grad_(False), processes.Flow(), "flow", null={"y": 3})


def run(d, n=3, **options):
    settings = {"solver": "euler", "steps": 4, "shape": (n, 2, 8, 8), "cond": {"y": torch.arange(n) % 3}, "seed": 1}
    with torch.no_grad():
        return sf.sample(d, **{**settings, **options})


def by_hand(x, destinations, count):
    """The matching of one item, one token after the other: the groups as sets."""
    unit = torch.nn.functional.normalize(x, dim=1)
    sources = [i for i in range(len(x)) if i not in destinations]
    likeness = {i: max((float(unit[i] @ unit[d]), -d) for d in destinations) for i in sources}
    groups = {i: [i] for i in range(len(x))}
    for i in sorted(sources, key=lambda i: -likeness[i][0])[:count]:
        groups[-likeness[i][1]].append(i)
        del groups[i]
    return groups


@given(seed=st.integers(0, 10**6), n=st.integers(4, 20), data=st.data())
def test_the_matching_is_its_definition(seed, n, data):
    x = torch.randn(1, n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    d = data.draw(st.integers(1, n - 1))
    destinations = data.draw(st.permutations(range(n)))[:d]
    count = data.draw(st.integers(0, n - d))
    found = match(x, torch.tensor([destinations]), count)
    assert found.kept.shape == (1, n - count)
    for token, group in by_hand(x[0], destinations, count).items():
        (at,) = (found.kept[0] == token).nonzero(as_tuple=True)[0].tolist()
        assert sorted(group) == (found.place[0] == at).nonzero(as_tuple=True)[0].tolist()
        torch.testing.assert_close(found.merge(x)[0, at], x[0, group].mean(0), atol=1e-6, rtol=1e-6)
        assert torch.equal(found.merge(x, prune=True)[0, at], x[0, token])
        torch.testing.assert_close(found.unmerge(found.merge(x))[0, group], x[0, group].mean(0).expand(len(group), -1), atol=1e-6, rtol=1e-6)  # fmt: skip


def test_tokens_of_one_value_merge_without_any_loss():
    centres = torch.randn(2, 4, 6)
    x = centres[:, torch.arange(16) % 4]
    found = match(x, torch.arange(4).expand(2, -1), 12)
    torch.testing.assert_close(found.unmerge(found.merge(x)), x)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_no_merging_is_the_network_bit_for_bit(name):
    d = denoiser(name)
    assert torch.equal(run(token_merging(0)(d)), run(d))
    assert torch.equal(run(cfg(2.0)(token_merging(0.0)(d))), run(cfg(2.0)(d)))


@pytest.mark.parametrize("name", ["dit", "unet"])
@pytest.mark.parametrize("options", [{}, {"prune": True}, {"destinations": "regular"}, {"parts": ("attention", "mlp")}])
def test_an_item_never_depends_on_its_batch_nor_on_the_side_of_guidance(name, options):
    d = denoiser(name)
    d = d if name == "dit" or "mlp" not in options.get("parts", ()) else denoiser("dit")
    inside = cfg(2.0)(token_merging(0.5, **options)(d))
    whole = run(inside)
    for other in (
        run(inside, n=1, cond={"y": torch.tensor([0])}),
        run(cfg(2.0, batched=False)(token_merging(0.5, **options)(d)))[:1],
        run(token_merging(0.5, **options)(cfg(2.0)(d)))[:1],
    ):
        torch.testing.assert_close(whole[:1], other, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(whole, run(cfg(2.0)(d)), atol=1e-4)


def test_work_falls_with_the_ratio_and_the_error_grows():
    d = denoiser()
    work = [operations(lambda r=r: run(token_merging(r, parts=("attention", "cross", "mlp"))(d))) for r in (0, 0.25, 0.5, 0.75)]  # fmt: skip
    assert work == sorted(work, reverse=True) and work[-1] < 0.7 * work[0]
    error = [float((run(token_merging(r)(d)) - run(d)).abs().mean()) for r in (0, 0.05, 0.75)]
    assert error[0] == 0 < error[1] < error[2]


def test_the_attention_runs_on_the_declared_number_of_tokens():
    d, seen = denoiser(), []
    d.net.blocks[1].attention.query.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    run(token_merging(0.75)(d), steps=1)
    run(token_merging(0.3)(d), steps=1)
    run(token_merging(0.5, least=65)(d), steps=1)
    run(token_merging(0.5)(d), steps=1, shape=(3, 2, 5, 7))  # sides that the stride does not divide
    assert seen == [16, 64 - 19, 64, 35 - 17]


def test_the_first_quarter_of_a_transformer_is_left_alone_and_nothing_of_a_u_net():
    torch.manual_seed(0)
    deep = networks.DiT(2, size=8, patch=1, width=16, depth=8, heads=2)
    d = sf.parametrized(deep.eval().requires_grad_(False), processes.Flow(), "flow")
    seen: dict[int, int] = {}
    for i, block in enumerate(deep.blocks):
        block.attention.query.register_forward_hook(lambda m, given, out, i=i: seen.update({i: out.shape[1]}))
    for options, merged in [({}, range(2, 8)), ({"spare": 0}, range(8)), ({"spare": 5}, range(5, 8))]:
        run(token_merging(0.25, **options)(d), steps=1, cond={})
        assert seen == {i: 48 if i in merged else 64 for i in range(8)}
    assert token_merging()(denoiser("unet")).spare == 0
    with pytest.raises(InputError, match="8 blocks"):
        token_merging(spare=8)(d)


def test_destinations_are_drawn_from_the_item_the_step_and_the_block_and_from_nothing_else():
    d = denoiser()
    wrapped = token_merging(0.5)(d)
    assert torch.equal(run(wrapped), run(wrapped))
    ctx = Context.of(2, [5, 6])
    one = wrapped._destinations(ctx, 4, (8, 8), 0)
    assert ctx.rng.k == 0  # the solver's draws are as they were
    assert torch.equal(one[:2], one[2:])  # both readings of guidance
    assert torch.equal(one[1:2], wrapped._destinations(Context.of(1, [6]), 1, (8, 8), 0))
    assert not torch.equal(one, wrapped._destinations(ctx, 4, (8, 8), 1))
    ctx.rng.at(1)
    assert not torch.equal(one, wrapped._destinations(ctx, 4, (8, 8), 0))
    region = (one // 16) * 4 + (one % 8) // 2
    assert torch.equal(region.sort(1).values, torch.arange(16).expand(4, -1))  # one a region


def test_runs_in_two_threads_never_meet():
    d = cfg(2.0)(token_merging(0.5)(denoiser()))
    apart(lambda seed: run(d, seed=seed))


def test_gradients_pass():
    d = denoiser()
    x = torch.randn(2, 2, 8, 8, requires_grad=True)
    token_merging(0.5)(d)(x, 0.5, Context.of(2)).mean.square().sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad != 0).all()


def test_the_grid_of_tokens():
    assert grid_of(64, (8, 8)) == (8, 8) and grid_of(12, (12, 16)) == (3, 4) and grid_of(9, (5, 5)) == (3, 3)
    with pytest.raises(InputError, match="no grid"):
        grid_of(7, (8, 8))


def test_refusals():
    d = denoiser()
    for call, said in [
        (lambda: token_merging(0.8), "0.75"),
        (lambda: token_merging(-0.1), "ratio"),
        (lambda: token_merging(stride=1), "stride"),
        (lambda: token_merging(parts=("heads",)), "attention, cross, mlp"),
        (lambda: token_merging(destinations="best"), "regular"),
        (lambda: token_merging()(sf.parametrized(torch.nn.Linear(2, 2), processes.Flow(), "flow")), "no known block"),
        (lambda: token_merging()(d)(torch.zeros(1, 2, 8, 8), 0.5, Context.of(1, None)), "regular"),
    ]:
        with pytest.raises(InputError, match=said):
            call()
    assert (
        token_merging(destinations="regular")(d)(torch.zeros(1, 2, 8, 8), 0.5, Context.of(1, None)).mean.shape[0] == 1
    )


def test_a_diffusers_network_is_merged_too():
    pytest.importorskip("diffusers")
    from diffusers import Transformer2DModel

    torch.manual_seed(0)
    net = Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, norm_num_groups=2, cross_attention_dim=6
    ).requires_grad_(False)  # fmt: skip

    class Adapter(torch.nn.Module):
        accepts = frozenset({"text"})

        def __init__(self):
            super().__init__()
            self.model = net

        def forward(self, x, label, text=None):
            return self.model(x, encoder_hidden_states=text, return_dict=False)[0]

    d = sf.parametrized(Adapter(), processes.Flow(), "flow")
    options = {"shape": (2, 4, 8, 8), "cond": {"text": torch.randn(2, 3, 6)}}
    plain = run(d, **options)
    assert torch.equal(run(token_merging(0)(d), **options), plain)
    near, far = (run(token_merging(r, parts=("attention", "cross", "mlp"))(d), **options) for r in (0.1, 0.75))
    assert 0 < (near - plain).abs().mean() < (far - plain).abs().mean()
    assert operations(lambda: run(token_merging(0.75)(d), **options)) < operations(lambda: run(d, **options))
