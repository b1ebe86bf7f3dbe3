"""Memory, time and error of the gradient of a sample in the number of steps, for each way to get it, on the bundled digits.

Peak bytes are those of all tensors alive at once beyond weights and inputs (``sf.gradients.Memory``), which has no noise;
seconds are CPU time on one thread. The error is that of the gradient by the start, against the probability flow: the
checkpointed gradient of a run of 400 steps of DPM-Solver++. Plain and checkpointed gradients differ from it because a short
run is another function; the adjoint also because it is discretised.

    python -m benchmarks.gradients [--steps 10 20 40 80] [--batch 8]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import sfumato as sf
from sfumato import gradients
from sfumato.core import Streams

METHODS = (
    "plain", "checkpoint", "checkpoint(store='sqrt')", "adjoint", "adjoint(store=False)", "adjoint(order=1)",
    "adjoint(order=1, variable='rho', store=False)",
)  # fmt: skip


def gradient(pipe: sf.Pipeline, method: str, steps: int, batch: int) -> Tensor:
    """The derivative of a fixed linear function of the samples by their start noise; weights get theirs too."""
    streams, like = Streams.of(0, batch), torch.empty(batch, *pipe.codec.shape(*pipe.size))
    x, weight = streams.normal(like).requires_grad_(), streams.normal(like)
    y = torch.arange(batch) % 10
    end = gradients.sample(pipe.denoiser, method=method, steps=steps, x=x, cond={"y": y})
    return torch.autograd.grad((end * weight).sum(), [x, *pipe.denoiser.parameters()])[0]


def measure(steps: Sequence[int] = (10, 20, 40, 80), batch: int = 8) -> dict[str, Any]:
    """A row a method and number of steps, and the growth of memory from the fewest steps to the most."""
    torch.set_num_threads(1)
    pipe = sf.load("digits")
    exact, rows = gradient(pipe, "checkpoint", 400, batch), []
    for method in METHODS:
        for n in steps:
            with gradients.Memory() as used:
                gradient(pipe, method, n, batch)
            began = time.process_time()
            found = gradient(pipe, method, n, batch)
            seconds = time.process_time() - began
            cosine = torch.cosine_similarity(found.double().flatten(), exact.double().flatten(), 0)
            rows.append({
                "method": method, "steps": n, "peak megabytes": round(used.peak / 2**20, 2), "seconds": round(seconds, 2),
                "relative error": round(float((found - exact).norm() / exact.norm()), 4), "1 - cosine": round(1 - float(cosine), 6),
            })  # fmt: skip
    peaks = {(r["method"], r["steps"]): r["peak megabytes"] for r in rows}
    growth = {m: round(peaks[m, steps[-1]] / peaks[m, steps[0]], 2) for m in METHODS}
    return {"batch": batch, "growth of memory": growth, "rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    print(json.dumps(measure(args.steps, args.batch), indent=1))
