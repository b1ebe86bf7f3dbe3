"""All figures of the first budget table, in one run: ``python -m benchmarks`` (or ``make bench``)."""

from __future__ import annotations

import json

from benchmarks import import_time, solvers, step_cost, training_speed


def main() -> None:
    """Measure and print one JSON object; nothing here fails: figures are for reading."""
    figures = {
        "import": import_time.measure(),
        "step": step_cost.measure(),
        "training": [training_speed.measure(training_speed.Work(*item)) for item in training_speed.NETWORKS.items()],
        "solvers": solvers.measure(quick=True)["summary"],
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
