"""Taps: read, edit, replace and skip the call of a named submodule; and trees of modules that share tensors."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.core import Context, Frozen, InputError, rebuild, tapped
from sfumato.denoisers import parametrized
from sfumato.guidance import cfg
from sfumato.processes import VP


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * gain


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, label: Tensor, vector: Tensor | None = None) -> Tensor:
        x = x if vector is None else x + vector
        for block in self.blocks:
            x = x + block(x, gain=2.0)
        return x


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def believe(net: nn.Module, *taps: Any, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return parametrized(net, VP())(x, 0.5, Context.of(len(x), None, taps=tuple(taps))).native


def test_read_edit_replace_and_skip() -> None:
    net, seen = Net(), []
    plain = believe(net)

    def read(ctx: Context, call: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((args[0].clone(), kwargs))
        return call(*args, **kwargs)

    assert torch.equal(believe(net, ("blocks.0", read)), plain)
    assert torch.equal(seen[0][0], X) and seen[0][1] == {"gain": 2.0}
    one = net.blocks[1](X, gain=2.0)
    skipped = believe(net, ("blocks.0", lambda ctx, call, x, gain: torch.zeros_like(x)))
    assert torch.allclose(skipped, X + one)
    edited = believe(net, ("blocks.0", lambda ctx, call, x, gain: call(x, gain=0.0)))
    assert torch.allclose(edited, X + one)
    replaced = believe(net, ("blocks.0.second", lambda ctx, call, h: -h))
    assert not torch.allclose(replaced, plain)
    whole = believe(net, ("", lambda ctx, call, x, label: x * 7))
    assert torch.equal(whole, 7 * X), "the empty path is the network itself"


def test_of_two_taps_on_one_module_the_later_is_outermost() -> None:
    net, order = Net(), []

    def named(name: str) -> Any:
        def tap(ctx: Context, call: Any, h: Tensor) -> Tensor:
            order.append(f"{name} in")
            out = call(h)
            order.append(f"{name} out")
            return out

        return tap

    believe(net, ("blocks.0.first", named("a")), ("blocks.0.first", named("b")), ("blocks.0.first", named("c")))
    assert order == ["c in", "b in", "a in", "a out", "b out", "c out"]
    order.clear()
    believe(
        net, ("blocks.0", lambda ctx, call, x, gain: named("block")(ctx, call, x)), ("blocks.0.first", named("layer"))
    )
    assert order == ["block in", "layer in", "layer out", "block out"]


def test_taps_live_for_their_call_only() -> None:
    net, calls = Net(), []

    def tap(ctx: Context, call: Any, h: Tensor) -> Tensor:
        calls.append(1)
        return call(h)

    plain = believe(net)
    believe(net, ("blocks.0.first", tap))
    assert len(calls) == 1
    assert torch.equal(believe(net), plain) and torch.equal(net(X, torch.zeros(4)), plain) and len(calls) == 1

    def broken(ctx: Context, call: Any, h: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        believe(net, ("blocks.0.first", broken))
    assert torch.equal(believe(net), plain), "also after an error"


def test_calls_inside_calls_add_their_taps() -> None:
    """A network that is called within the tap of another keeps both sets."""
    outer, inner, seen = Net(), Net(), []

    def note(name: str) -> Any:
        def tap(ctx: Context, call: Any, h: Tensor) -> Tensor:
            seen.append(name)
            return call(h)

        return tap

    def nested(ctx: Context, call: Any, h: Tensor) -> Tensor:
        believe(inner, ("blocks.0.first", note("inner")), x=h)
        return call(h)

    believe(outer, ("blocks.0.first", nested), ("blocks.1.first", note("outer")))
    assert seen == ["inner", "outer"]


def test_an_unknown_path_lists_what_there_is() -> None:
    with pytest.raises(
        InputError, match=r"no submodule 'blocks.7.first' to tap; there are: .*blocks\.0\.first.*blocks\.1"
    ):
        believe(Net(), ("blocks.7.first", lambda ctx, call, h: call(h)))
    with pytest.raises(InputError, match="no submodule 'block' to tap; there are: blocks"):
        believe(Net(), ("block", lambda ctx, call, h: call(h)))


def test_a_tapped_module_stays_itself() -> None:
    """Its type, its state, its copies: an average of the weights is tapped by the same path, each in its own right."""
    net = Net()
    plain, state = believe(net), {k: v.clone() for k, v in net.state_dict().items()}
    double = ("blocks.0.second", lambda ctx, call, h: 2 * call(h))
    edited = believe(net, double)
    assert isinstance(net.blocks[0].second, nn.Linear) and type(net.blocks[0].second).__name__ == "Linear"
    assert list(net.state_dict()) == list(state)
    twin = copy.deepcopy(net)
    assert torch.equal(believe(twin), plain) and torch.equal(believe(twin, double), edited)
    with torch.no_grad():
        twin.blocks[0].second.weight.zero_()
    assert torch.equal(believe(net, double), edited) and not torch.equal(believe(twin, double), edited)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    assert torch.equal(believe(averaged.module, double), edited)
    fresh = Net()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(believe(fresh, double), edited)
    again = pickle.loads(pickle.dumps(net))
    assert type(again.blocks[0].second) is nn.Linear
    assert torch.equal(believe(again), plain) and torch.equal(believe(again, double), edited)


def test_gradients_pass_through_taps() -> None:
    net = Net()
    ctx = Context.of(4, None, taps=(("blocks.0.first", lambda ctx, call, h: 3 * call(h)),))
    parametrized(net, VP())(X, 0.5, ctx).native.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_tap_gets_the_fork_of_the_call_it_is_in() -> None:
    """The two halves of guidance never read each other's cache."""
    net = Net()

    def cache(ctx: Context, call: Any, h: Tensor) -> Tensor:
        if "h" not in ctx.memory:
            ctx.memory["h"] = call(h)
        return ctx.memory["h"]

    vector = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    denoiser = cfg(2.0, batched=False)(parametrized(net, VP(), null={"vector": torch.zeros(3)}))
    ctx = Context.of(4, None, cond={"vector": vector}, taps=(("blocks.0.second", cache),))
    with torch.no_grad():
        cached = denoiser(X, 0.5, ctx).native
        plain = denoiser(X, 0.5, Context.of(4, None, cond={"vector": vector})).native
        assert torch.equal(cached, plain)
        assert set(ctx.memory) == {"conditional", "unconditional"}
        moved = denoiser(X + 1, 0.5, ctx).native
        assert not torch.equal(moved, denoiser(X + 1, 0.5, Context.of(4, None, cond={"vector": vector})).native)


def test_threads_tap_one_network_in_their_own_way() -> None:
    net, barrier = Net(), threading.Barrier(4)
    results: dict[int, Tensor] = {}

    def scale(k: int, wait: bool) -> Any:
        def tap(ctx: Context, call: Any, h: Tensor) -> Tensor:
            if wait:
                barrier.wait(timeout=30)
            return k * call(h)

        return "blocks.0.second", tap

    def work(k: int) -> None:
        for _ in range(5):
            results[k] = believe(net, scale(k, True))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for k in range(4):
        assert torch.equal(results[k], believe(net, scale(k, False)))


def test_tapped_can_be_used_alone() -> None:
    net, seen = Net(), []
    ctx = Context.of(4, None, taps=(("blocks.1", lambda ctx, call, x, gain: seen.append(gain) or call(x, gain=gain)),))
    with tapped(net, ctx):
        net(X, torch.zeros(4))
    net(X, torch.zeros(4))
    assert seen == [2.0]


def test_a_rebuilt_tree_shares_tensors_and_leaves_the_original() -> None:
    net = Net()
    net.register_buffer("mean", torch.ones(3))
    names: list[str] = []

    def swap(path: str, module: nn.Module) -> nn.Module | None:
        names.append(path)
        return nn.Sequential(module, nn.Tanh()) if path == "blocks.0.second" else None

    other = rebuild(net, swap)
    assert "blocks.1.first" in names and "" not in names
    assert isinstance(other.blocks[0].second, nn.Sequential) and isinstance(net.blocks[0].second, nn.Linear)
    assert other.blocks[0].second[0].weight is net.blocks[0].second.weight
    assert all(a is b for a, b in zip(other.parameters(), net.parameters(), strict=True))
    assert other.mean is net.mean and other.blocks is not net.blocks
    assert not torch.equal(other(X, None), net(X, None))
    same = rebuild(net, lambda path, module: None)
    assert torch.equal(same(X, None), net(X, None))


def test_a_frozen_teacher_shares_moves_and_is_never_saved() -> None:
    net = Net().train()
    owner = nn.Module()
    owner.student, owner.teacher = nn.Linear(3, 3), Frozen(net)
    assert list(owner.state_dict()) == ["student.weight", "student.bias"]
    assert len(list(owner.parameters())) == 2
    assert torch.equal(owner.teacher(X, None), net(X, None))
    owner.train()
    assert net.training and not owner.teacher.module.training and not owner.teacher.blocks[0].training
    assert owner.teacher.module.blocks[0].first.weight is net.blocks[0].first.weight
    twin = copy.deepcopy(owner)
    assert torch.equal(twin.teacher(X, None), net(X, None))
    owner.double()
    assert owner.teacher.blocks[0].first.weight.dtype == torch.float64
