"""Seconds that ``import sfumato`` adds to ``import torch``: whole interpreters, interleaved, medians of CPU time.

python benchmarks/import_time.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys

STATEMENTS = {
    "torch": "import torch",
    "sfumato": "import torch, sfumato; sfumato.sample, sfumato.processes, sfumato.solvers",
}
BUDGET = 0.15


def seconds(statement: str) -> float:
    """CPU time of one interpreter that runs this statement."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(rounds: int = 7) -> dict[str, float | bool]:
    """Median seconds of each statement and the difference."""
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(rounds + 1):  # the first round fills the disk cache
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    torch_time, ours = (statistics.median(times[name][1:]) for name in ("torch", "sfumato"))
    return {
        "torch": torch_time,
        "sfumato": ours,
        "added": ours - torch_time,
        "budget": BUDGET,
        "holds": ours - torch_time <= BUDGET,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    print(json.dumps(measure(parser.parse_args().rounds), indent=1))
