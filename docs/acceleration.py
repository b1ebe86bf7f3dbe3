"""Write docs/acceleration.md from docs/acceleration.json, which ``python -m benchmarks.acceleration --json docs/acceleration.json``
measures, docs/engines.json (``python -m benchmarks.engines``) and docs/pareto.json (``sfumato compare``): ``make docs``. Nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato import acceleration

HERE = Path(__file__).parent
SOURCE, PARETO, ENGINES = HERE / "acceleration.json", HERE / "pareto.json", HERE / "engines.json"
PAGE = HERE / "acceleration.md"
COMPARED = """sfumato tune emoji-latent --nfe 4 --items 16 --unseen 16 --budget 40 --out tuned-4.json
sfumato tune emoji-latent --nfe 8 --items 16 --unseen 16 --budget 40 --out tuned-8.json
sfumato compare emoji-latent --solver ddim --solver arc --nfe 4 --nfe 8 --nfe 20 --nfe 50 \\
    --sampler tuned-4.json --sampler tuned-8.json --accelerate 'deepcache(interval=3)' --accelerate int8 \\
    --also emoji-latent-4 --also emoji-latent-1 --reference emoji:train --features emoji-judge -n 200 --fine 20 --out docs/pareto.png"""


def arms(d: Mapping[str, Any]) -> str:
    """What each acceleration does to the seconds, the work and the pictures."""
    lines = ["| | speed | work | Fréchet distance | its change |", "|---|---|---|---|---|"]
    for r in d["rows"]:
        low, high = r["interval"]
        lines.append(
            f"| {r['arm']} | {r['speed']:.2f} x | {r['work']:.2f} | {r['frechet']:.4f} [{low:.4f}, {high:.4f}] | {r['change']:+.1%} |"
        )
    return "\n".join(lines)


def front(rows: list[Mapping[str, Any]]) -> str:
    """The rows of the comparison, fastest first, the front in bold."""
    lines = ["| | calls | rows | ms an image | quality |", "|---|---|---|---|---|"]
    for r in sorted((r for r in rows if "quality" in r), key=lambda r: r["seconds"]):
        q, mark = r["quality"], "**" if r["front"] in ("seconds", "both") else ""
        lines.append(
            f"| {mark}{r['solver']}{mark} | {r['calls']:g} | {r['rows']:g} | {1000 * r['seconds']:.0f} | {q['value']:.4f} [{q['low']:.4f}, {q['high']:.4f}] |"
        )
    return "\n".join(lines)


def engines(d: Mapping[str, Any]) -> str:
    """A call in 8 bits on each engine."""
    lines = ["| threads | engine | ms a call | speed | error |", "|---|---|---|---|---|"]
    for run in d["runs"]:
        for r in run["rows"]:
            lines.append(
                f"| {run['threads']} | {r['engine']} | {1000 * r['seconds']:.0f} | {r['speed']:.2f} x | {r['error']:.1%} |"
            )
    return "\n".join(lines)


def names() -> str:
    """Every registered acceleration."""
    lines = ["| spec | what it does |", "|---|---|"]
    for name in acceleration.names():
        first = (acceleration.registry.find(name).__doc__ or "").partition("\n")[0]
        lines.append(f"| `{name}` | {first.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


PROSE = """# The same model in less work

```python
import sfumato as sf

pipe = sf.load("emoji-latent")
fast = pipe.accelerated("deepcache(interval=3)")  # any of the names below, or several: "token-merging | deepcache"
images = fast.generate(["red heart"], steps=50)
```

An acceleration is a Denoiser around a Denoiser, as guidance is: it goes with every solver, guidance, edit and task, keeps all it
remembers in the run's Context, and leaves the model as it was.

{names}

`sf.acceleration` has the same as functions, and what needs more than a number: quantisation with its calibration, pruning with
its training. [Distillation](distillation.md) changes the number of calls instead.

## What it costs and gains

{model}, {n} prompts, {steps} steps of DDIM, guidance {guidance:g}; seconds on {threads} of this CPU with torch {torch}, the
Fréchet distance to the training drawings of the prompts in the judge's features (`python -m benchmarks.acceleration`).

{arms}

## Eight bits on three engines

`int8` runs on torch's own oneDNN kernels and needs nothing else. `int8(backend='onnxruntime')` computes the same codes as one
graph (`pip install 'sfumato[onnx]'`), which is made at the first opening and kept; `int8(backend='torchao')` compiles torchao's
linear layers, whose inputs have a range a token (`pip install 'sfumato[torchao]'`, and a C++ compiler). Both take transformers of
linear layers and no taps: a call with a cache, merged tokens or attention control runs on torch's kernels. A call of
{engine_rows} rows of {engine_model} (two a picture under guidance), the least time of 60, and its error from the full network
(`python -m benchmarks.engines --threads 1 2`):

{engines}

The ranges of `int8` and `quantized` come from 64 runs of the model. They are kept in `$SFUMATO_CACHE` (else `~/.cache/sfumato`) under
the model's fingerprint and all settings, so that the next opening reads them; commands say which of the two they do.

## Teacher, solvers, students and accelerations on one picture

![quality against calls and seconds](pareto.png)

```
{compared}
```

The {quality}, against real seconds; in bold what nothing beats in both. Under guidance the network evaluates two rows for a call.

{front}
"""


def page(d: Mapping[str, Any], pareto: Mapping[str, Any], engine: Mapping[str, Any]) -> str:
    """The whole page."""
    rows = pareto["rows"]
    quality = next(r["quality"] for r in rows if "quality" in r)
    about = {k: d[k] for k in ("model", "n", "steps", "guidance", "torch")}
    about["threads"] = "one thread" if d["threads"] == 1 else f"{d['threads']} threads"
    return PROSE.format(
        **about, engines=engines(engine), engine_rows=engine["rows"], engine_model=engine["model"], names=names(), arms=arms(d), compared=COMPARED, front=front(rows),
        quality=f"{quality['name']} of {quality['n']} pictures to {quality['reference']} in the features of {quality['features']}",
    )  # fmt: skip


def write() -> None:
    """Write the page."""
    PAGE.write_text(page(*(json.loads(path.read_text("utf-8")) for path in (SOURCE, PARETO, ENGINES))), "utf-8")


if __name__ == "__main__":
    write()
