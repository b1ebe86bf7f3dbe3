"""DiffEditor where the truth is known: coloured shapes on a flat ground, whose every cell the model knows exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfumato as sf
from sfumato import editing, grids, solvers
from sfumato.codecs import build
from sfumato.editing.methods.diffeditor import DiffEditor
from sfumato.editing.regions import disc

SIDE, SPREAD = 16, 0.2
GROUND, RED, BLUE = 0, 1, 2
COLOURS = torch.tensor([[-1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]], dtype=torch.float64)


class Cells(nn.Module):
    """Every cell is near one of three colours, N(colour, SPREAD^2), whatever the others are: v by Bayes' rule."""

    def __init__(self, process: Any) -> None:
        super().__init__()
        self.process, self.seen = process, nn.Identity()
        self.own = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        c = self.process.coef(float(label.flatten()[0]))
        total = c.alpha**2 * SPREAD**2 + c.sigma**2
        fit = torch.einsum("bchw,kc->bkhw", x, COLOURS) * c.alpha / total  # all colours have one length
        colour = torch.einsum("bkhw,kc->bchw", fit.softmax(1), COLOURS)
        rest = x - c.alpha * colour
        x0 = self.seen(colour + c.alpha * SPREAD**2 / total * rest)
        return c.alpha * c.sigma / total * rest - c.sigma * x0


def painted(*shapes: tuple[int, tuple[int, int, int, int] | Tensor]) -> Tensor:
    """(1, 3, SIDE, SIDE): shapes (colour, (top, bottom, left, right) or mask) on the ground."""
    index = torch.full((SIDE, SIDE), GROUND)
    for colour, place in shapes:
        if isinstance(place, Tensor):
            index[place[0, 0] > 0.5] = colour
        else:
            index[place[0] : place[1], place[2] : place[3]] = colour
    noise = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (COLOURS[index].permute(2, 0, 1) + SPREAD * noise)[None]


def window(top: int, bottom: int, left: int, right: int) -> Tensor:
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., top:bottom, left:right] = 1
    return mask


def edit(process: Any, x0: Tensor, mask: Tensor | None = None, points: Any = (), reference: Any = None, **numbers: Any):
    """The state that the task ends with."""
    denoiser = sf.parametrized(Cells(process), process, "v")
    given = {"mask": mask is not None, "points": bool(points), "reference": reference is not None}
    asked = editing.Task(
        denoiser=denoiser, codec=build("identity", {"channels": 3}), x0=x0, source={}, target={}, guidance=lambda d: d,
        images=torch.zeros(len(x0), 3, SIDE, SIDE, dtype=torch.uint8), scale=1.0, solver=solvers.get("ddim"),
        grid=grids.get("uniform"), steps=40, mask=mask, points=points, reference=reference,
        given=frozenset(k for k, said in given.items() if said),
    )  # fmt: skip
    with torch.no_grad():
        return DiffEditor(bank=False, paths=("seen",), **numbers)(asked)


def colours(x: Tensor) -> Tensor:
    """The nearest colour of each cell."""
    return torch.einsum("bchw,kc->bkhw", x, COLOURS).argmax(1)


def wrong(x: Tensor, truth: Tensor, where: Tensor) -> float:
    """The share of cells of a region that have another colour than they should. Two in a hundred are lost to inversion."""
    return float((colours(x) != colours(truth))[where[:, 0] > 0.5].double().mean())


PLACES = pytest.mark.parametrize("place", [(3, 7, 2, 6), (8, 13, 1, 4), (5, 8, 3, 8)], ids=str)
FLOW, STRONG = sf.processes.Flow(), 20.0


@PLACES
def test_a_pasted_object_is_the_one_of_the_reference_and_nothing_else_changes(place: Any) -> None:
    reference = painted((BLUE, place))
    everywhere = torch.ones(1, 1, SIDE, SIDE)
    assert wrong(edit(FLOW, painted(), window(*place), (), reference, task="paste"), reference, everywhere) <= 0.02
    # and moved beside what is there already
    top, bottom, left, right = place
    x, y = float((left + right) // 2), float((top + bottom) // 2)
    got = edit(FLOW, painted((RED, place)), window(*place), ((x, y, x + 7, y),), reference, task="paste")
    truth = painted((RED, place), (BLUE, (top, bottom, left + 7, right + 7)))
    assert wrong(got, truth, everywhere) <= 0.02


@PLACES
def test_a_dragged_point_brings_what_was_around_it(place: Any) -> None:
    image, (top, bottom, left, right) = painted((RED, place)), place
    end = disc((12.0, 9.0), 0.1 * SIDE, (SIDE, SIDE))
    points = ((float((left + right) // 2), float((top + bottom) // 2), 12.0, 9.0),)
    truth = painted((RED, place), (RED, end))
    got = edit(FLOW, image, None, points, task="drag", scale=STRONG)
    assert wrong(got, truth, 1 - end) <= 0.02 and wrong(got, truth, end) <= 0.2
    assert wrong(edit(FLOW, image, None, points, task="drag", scale=0.0), truth, end) >= 0.8


@PLACES
def test_an_object_takes_the_looks_of_another_and_the_ground_stays(place: Any) -> None:
    image, other, mask = painted((RED, place)), painted((BLUE, place)), window(*place)
    got = edit(FLOW, image, mask, (), other, task="appearance", scale=STRONG)
    assert wrong(got, other, 1 - mask) <= 0.02 and wrong(got, other, mask) <= 0.2
    assert wrong(edit(FLOW, image, mask, (), other, task="appearance", scale=0.0), other, mask) >= 0.8


@PLACES
def test_a_moved_object_is_where_it_should_be_and_leaves_ground(place: Any) -> None:
    """What it leaves is told by means over the region only, so single cells may keep their colour."""
    top, bottom, left, right = place
    image, mask, there = painted((RED, place)), window(*place), window(top, bottom, left + 7, right + 7)
    x, y = float((left + right) // 2), float((top + bottom) // 2)
    truth = painted((RED, (top, bottom, left + 7, right + 7)))
    got = edit(FLOW, image, mask, ((x, y, x + 7, y),), task="move", scale=STRONG)
    assert wrong(got, truth, 1 - mask) <= 0.02 and wrong(got, truth, there) <= 0.1
    assert wrong(got, truth, mask) <= 0.4
    assert wrong(edit(FLOW, image, mask, ((x, y, x + 7, y),), task="move", scale=0.0), truth, mask) >= 0.8


@pytest.mark.parametrize("process", [sf.processes.VP(), sf.processes.Flow()], ids=["vp", "flow"])
def test_a_move_by_nothing_keeps_every_cell(process: Any) -> None:
    place = (3, 7, 2, 6)
    image = painted((RED, place))
    got = edit(process, image, window(*place), ((4.0, 5.0, 4.0, 5.0),), task="move", scale=0.5)
    inverted = edit(
        process, image, window(*place), ((4.0, 5.0, 4.0, 5.0),), task="move", scale=0.0, noise=0.0, repeats=0
    )
    assert wrong(got, inverted, torch.ones(1, 1, SIDE, SIDE)) == 0
