"""Eight bits on each engine that is installed: ``python -m benchmarks.engines [--threads 1 2] [--json docs/engines.json]``.

One call of the network of a model, on states of its own runs, in turns: the least of the seconds (what else the machine does only
adds to them), and how far the answer is from that of the full network. Compilation and the first calls are not timed, and are said.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import sfumato as sf
from sfumato import acceleration
from sfumato.core import Context

WANTED = {"onnxruntime": ("onnxruntime", "onnxscript"), "torchao": ("torchao",)}
NAMES = {"onednn": "torch's oneDNN", "onnxruntime": "onnxruntime", "torchao": "torchao, compiled"}


def engines() -> list[str]:
    """Those that are installed; what is left out is said."""
    found = []
    for backend in NAMES:
        missing = [name for name in WANTED.get(backend, ()) if find_spec(name) is None]
        if missing:
            print(f"left out, {missing[0]} is not installed: {NAMES[backend]}")
        else:
            found.append(backend)
    return found


@torch.no_grad()
def measure(model: str, rows: int, threads: int, repeat: int) -> dict[str, Any]:
    """Seconds and errors of a call with so many threads, as JSON values."""
    torch.set_num_threads(threads)
    pipeline = sf.load(model)
    calibration = pipeline.calibration()
    batch = next(calibration.batches(rows))
    arms: dict[str, Any] = {"full precision": pipeline.denoiser}
    arms |= {NAMES[b]: acceleration.int8(pipeline.denoiser, calibration, backend=b) for b in engines()}

    def call(denoiser: Any) -> torch.Tensor:
        return denoiser(batch.x, batch.t, Context(cond=batch.cond, batch=rows)).native  # type: ignore[no-any-return]

    whole, found = call(pipeline.denoiser), []
    taken: dict[str, list[float]] = {name: [] for name in arms}
    first: dict[str, float] = {}
    for turn in range(-2, repeat):
        for name, denoiser in arms.items():
            began = time.perf_counter()
            call(denoiser)
            seconds = time.perf_counter() - began
            first.setdefault(name, seconds)
            if turn >= 0:
                taken[name].append(seconds)
    base = min(taken["full precision"])
    for name, denoiser in arms.items():
        least = min(taken[name])
        error = float((call(denoiser) - whole).norm() / whole.norm())
        found.append({"engine": name, "seconds": least, "speed": base / least, "error": error, "first": first[name]})
    return {"threads": threads, "rows": found}


def main() -> None:
    """Print one line an engine, and keep all figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-latent")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeat", type=int, default=60)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    runs = [measure(given.model, given.rows, threads, given.repeat) for threads in given.threads]
    for run in runs:
        for row in run["rows"]:
            print(
                f"{run['threads']} threads, {row['engine']:20} {1000 * row['seconds']:6.1f} ms, {row['speed']:.2f} x the speed, "
                f"error {row['error']:.4f}; first call {row['first']:.1f} s"
            )
    if given.json is not None:
        about = {"model": given.model, "rows": given.rows, "torch": torch.__version__.split("+")[0], "runs": runs}
        given.json.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
