"""Large sets of samples: shards made in any number of processes, continued where a run was cut off."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sfumato.cli.sample import BESIDE

PER_SHARD = 1024
WORK = ".work"


class Generated:
    """The pictures low .. high of a card as a data set: item i is "x" uint8 (C, H, W) and, where there is one, "caption".

    Picture i draws from stream (seed, i), as on a sheet of the same card: neither the shard nor the number of processes counts.
    """

    def __init__(self, pipeline: Any, card: Mapping[str, Any], low: int, high: int) -> None:
        from sfumato.core import Streams

        self.pipeline, self.card, self.low, self.high = pipeline, card, low, high
        self.streams = Streams.of(card["seed"], high)

    def __len__(self) -> int:
        return self.high - self.low

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """Those pictures."""
        rows = [self.low + i for i in indices]
        prompts = [self.card["prompts"][row // self.card["n"]] for row in rows] if self.card["prompts"] else None
        settings = {name: self.card[name] for name in ("steps", "solver", "grid", "guidance", "cond")}
        settings |= {name: self.card[name] for name in BESIDE if name in self.card}
        images = self.pipeline.generate(
            prompts or len(rows), seed=self.streams.select(rows), batch=len(rows), **settings
        )
        return {"x": images} if prompts is None else {"x": images, "caption": prompts}


def make(out: str, card: Mapping[str, Any], count: int, per_shard: int = PER_SHARD) -> None:
    """Write ``count`` pictures into the folder ``out`` as :class:`sfumato.training.data.Shards`.

    Process r of w (started by ``sfumato sample --processes``, torchrun or accelerate) makes shards r, r + w, ...; each is
    finished on its own, so a run that was cut off goes on after them, also in another number of processes. Raises
    InputError where the folder holds something else.
    """
    from accelerate import PartialState

    import sfumato
    from sfumato.cli._launch import on_cpu
    from sfumato.training.data import write_shards

    folder = Path(out)
    described = json.loads(json.dumps({**card, "count": count, "per_shard": per_shard}))
    if _finished(folder, described):
        return
    state = PartialState(cpu=on_cpu())
    if state.is_main_process:
        _claim(folder, described)
    state.wait_for_everyone()
    starts = list(range(0, count, per_shard))
    pipeline = sfumato.load(card["model"])
    for number in range(state.process_index, len(starts), state.num_processes):
        low = starts[number]
        part = Generated(pipeline, card, low, min(low + per_shard, count))
        write_shards(part, folder / WORK / f"{number:05d}", per_shard=per_shard, card={**described, "shard": number})
    state.wait_for_everyone()
    if state.is_main_process:
        _join(folder, described, [min(per_shard, count - low) for low in starts])


def _join(folder: Path, card: Mapping[str, Any], counts: list[int]) -> None:
    """One data set of the finished shards; may be cut off and done again."""
    for number in range(len(counts)):
        made = folder / WORK / f"{number:05d}" / "00000.safetensors"
        if made.is_file():  # else it was moved before a run was cut off here
            os.replace(made, folder / f"{number:05d}.safetensors")
    _keep(folder / "index.json", {"counts": counts, "card": card})
    shutil.rmtree(folder / WORK)


def _finished(folder: Path, card: Mapping[str, Any]) -> bool:
    from sfumato.core.errors import InputError
    from sfumato.training.data import Shards

    if not (folder / "index.json").is_file():
        return False
    if Shards(folder).card != card:
        raise InputError(f"{folder} holds other samples: choose another folder")
    return True


def _claim(folder: Path, card: Mapping[str, Any]) -> None:
    """Begin, or go on: the same card in a folder that holds nothing else."""
    from sfumato.core.errors import InputError

    plan = folder / WORK / "card.json"
    if plan.is_file():
        if json.loads(plan.read_text("utf-8")) != card:
            raise InputError(f"{folder} holds the beginning of other samples: choose another folder, or empty it")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: give a new folder for the shards")
    plan.parent.mkdir(parents=True)
    _keep(plan, card)


def _keep(path: Path, value: Mapping[str, Any]) -> None:
    from sfumato.files import write_atomically

    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=1).encode())
