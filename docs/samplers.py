"""Write docs/samplers.md and docs/samplers.png from docs/samplers.json, which ``python -m benchmarks.solvers --tuned --json
docs/samplers.json`` measures: ``make docs``. Nothing is measured here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE, PAGE, PICTURE = (HERE / f"samplers.{end}" for end in ("json", "md", "png"))
Row = Mapping[str, Any]
# samplers of k-diffusion and azula: ours of the same method
TWINS = {"euler": "ddim", "DDIM": "ddim", "heun": "heun", "Heun": "heun", "dpmpp_2m": "dpm-solver++",
         "xEAB2": "dpm-solver++", "zEAB3": "dpm-solver++(order=3)"}  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers to three digits."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def against(d: Row) -> str:
    """Error of ``arc`` and of the best peer, a line a case."""
    calls = list(dict.fromkeys(row["calls"] for row in d["ratios"]))
    lines = []
    for case in d["cases"]:
        here = {row["calls"]: row for row in d["ratios"] if row["case"] == case["case"]}
        lines.append([case["case"], *(_versus(here[n]) for n in calls)])
    return table(["case", *(f"{n} calls" for n in calls)], lines)


def _versus(row: Row) -> str:
    text = f"{row['ours']:.2g} / {row['peer']:.2g}"
    return f"**{text}**" if row["ratio"] < 1 else text


def lost(d: Row) -> str:
    """Where a peer is better."""
    rows = sorted((row for row in d["ratios"] if row["ratio"] >= 1), key=lambda row: -row["ratio"])
    if not rows:
        return "Nowhere in this table."
    lines = [(r["case"], r["calls"], r["best peer"], r["ours"], r["peer"], r["ratio"]) for r in rows]
    return table(["case", "calls", "who", "its error is below ours of", "being", "ours / its"], lines)


def by_rms(d: Row) -> str:
    """How the comparison turns out by the rms over items."""
    worse = sum(row["rms ratio"] > 1 for row in d["ratios"])
    return f"{d['summary']['geometric mean of rms']:.2f} (above 1 in {worse} of {len(d['ratios'])})"


def matched(found: Row) -> str:
    """Our best setting at each place over theirs: both chosen anew."""
    s = found["best summary"]
    return f"{s['geometric mean']:.2f}, worst {s['worst']:.3g} (above 1 in {s['above 1']} of {s['of']}; by rms {s['geometric mean of rms']:.2f})"


def settings(d: Row) -> str:
    """Our fixed settings, and at how many places each is the best of them."""
    best = [row["sampler"] for row in d["best ratios"]]
    rows = [(name, f"`{spec}`", best.count(name)) for name, spec in d["settings"].items()]
    return table(["setting", "solver on grid", "best of ours"], rows)


def ranking(d: Row) -> str:
    """Every sampler by the geometric mean of its error over the best of all at that case and number of calls."""
    chosen = set(d["settings"]) - {"arc"}  # those of the second reading are a list of their own
    usable = [row for row in d["rows"] if "median" in row and row["sampler"] not in chosen]
    best: dict[tuple[str, int], float] = {}
    for row in usable:
        key = row["case"], row["budget"]
        best[key] = min(best.get(key, row["median"]), row["median"])
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in usable:
        found.setdefault((row["who"], row["sampler"]), []).append(
            (row["budget"], row["median"] / best[row["case"], row["budget"]])
        )
    calls = sorted({row["budget"] for row in usable})
    lines = []
    for (who, name), values in found.items():
        each = [statistics.geometric_mean(v for n, v in values if n == call) for call in calls]
        lines.append((f"{who} `{name}`", len(values), *each, statistics.geometric_mean(v for _, v in values)))
    most = max(line[1] for line in lines)
    lines = sorted((line for line in lines if line[1] > most / 2), key=lambda line: line[-1])
    return table(["sampler", *(f"{n} calls" for n in calls), "all"], [(line[0], *line[2:]) for line in lines])


def ablation(d: Row) -> str:
    """Error by what the polynomial is of and in."""
    kinds = list(dict.fromkeys(row["polynomial"] for row in d["ablation"]))
    lines = []
    for case in d["cases"]:
        here = {row["polynomial"]: row for row in d["ablation"] if row["case"] == case["case"]}
        lines.append([case["case"], *(here[kind].get("median", "refused") for kind in kinds)])
    return table(["case", *kinds], lines)


def tuned(d: Row) -> str:
    """What ``sf.tune`` reaches."""
    if not d["tuned"]:
        return "Not measured in this run."
    lines = [
        (r["case"], r["budget"], f"{r['method']}: {r['sampler']}", r["median"], r["peer"], r["best peer"], r["ratio"],
         r["rms ratio"])
        for r in d["tuned"]
    ]  # fmt: skip
    head = ["model", "calls", "chosen", "its error", "best peer's", "which", "ratio", "by rms"]
    means = {kind: found["geometric mean"] for kind, found in d["tuned summary"].items()}
    trained = [r for r in d["tuned"] if r["kind"] == "trained"]
    halves = sum(r["ratio"] <= d["budget"]["tuned, trained"] for r in trained)
    return table(head, lines) + (
        f"\n\nGeometric mean of the ratios {means['all']:.3f} (budget {d['budget']['tuned']:g}): {means['exact']:.3f} on the exact cases and "
        f"{means['trained']:.2f} on the bundled models, where it at least halves the best peer's error in {halves} of {len(trained)}."
    )


def libraries(d: Row, budget: Row) -> str:
    """``arc``, and our best setting, over the best of the three libraries at each place."""
    calls = sorted({r["calls"] for r in d["ratios"]})
    found = {(r["case"], r["calls"]): r for r in d["ratios"]}
    lines = [
        [case, *(_versus(found[case, n]) for n in calls)] for case in dict.fromkeys(r["case"] for r in d["ratios"])
    ]
    above = "; ".join(
        f"{r['case']}, {r['calls']} calls: {r['ratio']:.4g} ({r['best peer']})" for r in d["ratios"] if r["ratio"] > 1
    )
    s = d["summary"]
    return table(["case", *(f"{n} calls" for n in calls)], lines) + (
        f"\n\n- **One setting of ours against all of theirs**: `arc` has a geometric mean of {s['geometric mean']:.2f}, by rms "
        f"{s['geometric mean of rms']:.2f}, and is above 1 in {s['above 1']} of {s['of']}"
        f"{f' ({above})' if above else ''}. The budget is {verdict(s, budget)}.\n"
        f"- **Our best setting against their best**, both chosen anew at each place: {matched(d)}. The budget is "
        f"{verdict(d['best summary'], budget)}. Where it comes to 1 the two are one method, which both have, and differ by rounding."
    )


def tuned_over_all(d: Row, peers: Row) -> str:
    """What ``sf.tune`` reaches over the best of the three libraries at each place."""
    best = {(r["case"], r["calls"]): r["peer"] for r in peers["ratios"]}
    rows = [(r["median"] / best[r["case"], r["budget"]], r["case"], r["budget"]) for r in d["tuned"]]
    worst, case, calls = max(rows)
    mean = statistics.geometric_mean(ratio for ratio, *_ in rows)
    return f"{mean:.3f} in the geometric mean over {len(rows)} places, worst {worst:.2f} ({case}, {calls} calls)"


def verdict(s: Row, budget: Row) -> str:
    """Whether a summary keeps the budget, and if not, which half of it."""
    mean, worst = s["geometric mean"] <= budget["geometric mean"], s["worst"] <= budget["worst"]
    if mean and worst:
        return "kept"
    return f"missed: the mean is {'kept' if mean else 'missed'}, {s['above 1']} of {s['of']} are above 1"


def crossing(d: Row) -> str:
    """The signed errors on one Gaussian after another."""
    rows = d["crossing"]
    lines = [[name, *(f"{row[name]:+.1e}" for row in rows)] for name in ("vAB3", "arc")]
    return table(["std of the data", *(f"{row['std']:g}" for row in rows)], lines)


def steps(d: Row) -> str:
    """Microseconds of our step over theirs, of the nearest method."""
    spent = {(r["who"], r["sampler"]): r["microseconds"] for r in d["costs"]}
    rows = [(f"{who} `{name}`", v, f"`{TWINS[name]}`", spent["sfumato", TWINS[name]], spent["sfumato", TWINS[name]] / v)
            for (who, name), v in spent.items() if who in ("k-diffusion", "azula")]  # fmt: skip
    return table(["sampler", "microseconds", "ours", "microseconds", "ours / its"], rows)


def _own(d: Row) -> set[tuple[str, str]]:
    return {(r["who"], r["sampler"]) for r in d["rows"] if r["who"] in ("sfumato", "diffusers")}


def costs(d: Row) -> str:
    """Microseconds a step outside the network and memory."""
    rows = [(f"{r['who']} `{r['sampler']}`", r["microseconds"], r["kilobytes"]) for r in d["costs"]]
    return table(["sampler", "microseconds a step", "peak kilobytes"], rows)


def choice(d: Row) -> str:
    """The advice, with figures."""
    s = d["summary"]
    lines = [
        (
            "the model's own result in few calls, any model",
            '`solver="arc"`',
            f"{s['geometric mean']:.2f} of the best peer's error in the geometric mean over {s['of']} comparisons, worst "
            f"{s['worst']:.3g} ({s['worst at']})",
        ),
        ("one model, many pictures", "`sfumato tune MODEL --nfe 8`", "see below; a search that is paid for once"),
        ("a published figure to repeat", "the solver of that paper by its name", "`sfumato papers --family solvers`"),
        ("a run that goes on with random noise", '`"sa-solver"`, `"dpm-solver++sde"`', "has no end point to compare"),
        (
            "inversion and editing",
            "a solver that says `reversible`, or `arc` with more steps",
            "[At home with diffusers](diffusers.md)",
        ),
    ]  # fmt: skip
    return table(["you want", "use", "because"], lines)


PROSE = """# Which sampler?

Generated by `make docs` from `docs/samplers.json`, which `python -m benchmarks.solvers --tuned --json docs/samplers.json`
measured with torch {torch} and diffusers {diffusers} in one process.

{choice}

![Error against network calls](samplers.png)

## Error at equal calls

The distance of a sample from the end of its own probability flow, root mean square over its elements, median over the items:
ours (`arc` on its own grid, nothing tuned) / whichever of diffusers' schedulers is best at that place. Bold where ours
is smaller.

{against}

The budget of this project is a geometric mean of {budget} and never above 1. It can be read in two ways.

- **One setting of ours against all of theirs**, as in this table: the mean is {mean}, and the budget is {verdict}. By the rms over
  the items, which a few items on the border of two results dominate, the mean is {rms}.
- **Our best setting against their best**, both chosen anew at each place: {matched}.
  The budget is {best}. Ours is chosen from {count} fixed settings, theirs from twelve (nine for flow). Ours are `arc`, what it is
  made of in other forms and variables, and the multistep methods of other libraries that are strongest below:

{settings}

### Where a peer wins

{lost}

### All samplers

Error over the best of all at the same place, geometric mean over the cases; only samplers that serve most cases.

{ranking}

## `arc`

The linear part of the probability-flow equation is solved exactly, and what the network says is held polynomial on the way
(Lu et al. 2022; Zhang & Chen 2023; Zhao et al. 2023). Published members of this family hold it polynomial in
lambda = log(alpha / sigma), which runs to infinity at clean data, where equal spaces of it mean nothing to the network. The angle
of (alpha, sigma) = r (cos angle, sin angle) and sigma / alpha are finite there. But at the noisy end they are worse: there, what a
network says of x0 carries its error times sigma / alpha, and in the angle such nodes lie close together, so a polynomial takes that
error for a slope. An exact belief does not mind; a trained eps network does (the rows of `digits` and `emoji-latent` below).

So `arc` takes its polynomial in log(1 + sigma / alpha), which is -lambda where noise rules and sigma / alpha where data does
('soft'). It holds the angular velocity v polynomial, which is 0 for standard normal data, so that it integrates only what the data
has of structure; below 7 calls, where a polynomial has to bridge most of that structure at once, it holds x0. A corrector mends
each state with the belief that was read at it, without another call. VP, EDM and Flow give the same iterates but for r. All
numbers of `arc` and of its grid were chosen on sixteen other distributions and on other noise and guidance for the networks; with
one exception: of two grids that were about as good there, the one was taken that is better at 20 calls on `digits` of this page.

Order 3 and corrected, on the grid `arctan` at {ablated} calls, by what the polynomial is of (x0, or v) and in:

{ablation}

In code, `sf.solvers.get("arc")`; its present configuration:

> {arc}

## Tuned

`sf.tune` at 5, 8 and 10 calls on noise of its own, then both on the noise of the tables above, which neither has seen:

{tuned}

`sfumato compare MODEL` draws such a picture for your own model, with seconds beside calls.

## Cost

A (4, 3, 32, 32) float32 tensor on one thread; the network returns its input, so all of it is the solver. Memory is the peak of what
torch holds during 100 steps.

{costs}

## How it was measured

{cases}

- Exact cases know their belief in closed form, under diffusers' linear schedule; `digits` (eps, VP) and `emoji-latent` (flow) are the
  bundled networks with guidance 1.
- The ends come from classical Runge-Kutta of order 4 in the angle, with which no solver here has a part; on the networks they are
  known less exactly than on the exact cases, so small errors of `emoji-latent` are hardly resolved.
- Same denoiser, same start noise, same schedule for all. diffusers' schedulers are asked at the exact noise level of their own
  sigma (they round it to a label under Karras and logSNR spacing); for flow, those that begin at sigma = 0.999 are handed the
  state there; a solver of two calls a step takes as many steps as the budget allows. Of twelve settings (nine for flow) the best
  one counts, chosen anew for each case and number of calls.
- k-diffusion and azula need torchvision, so they are no part of this run: their own is below.

## Beside diffusers, k-diffusion and azula at once

All cases again with the three libraries in one process, in an environment of their own (`benchmarks/solvers_k_diffusion.py` says how it
is made; `python -m benchmarks.solvers_k_diffusion --json docs/samplers-peers.json`): `arc`, one setting, over the best of
{settings_of_peers} of k-diffusion's and azula's and those of diffusers above, chosen anew for each case and number of calls. Bold where ours is
below.

{libraries}
- **Tuned** for the model, as above, over the best of the three: {tuned_over_all}.

Microseconds a step outside the network in that run, of the nearest method of ours:

{steps}

A best of {settings_of_peers} contains errors that happen to cross 0. On N(0, 0.49 I) at 8 calls azula's vAB3 does, at a standard deviation of
0.70, which is the one of that case. The end that each reaches minus the true one, from x = 1:

{crossing}
"""


def page(d: Row) -> str:
    """The whole page."""
    import inspect

    from sfumato import solvers

    s = d["summary"]
    about = inspect.getdoc(solvers.registry.find("arc")) or ""
    peers = json.loads((HERE / "samplers-peers.json").read_text("utf-8"))
    return PROSE.format(
        **d["versions"], choice=choice(d), against=against(d), mean=f"{s['geometric mean']:.2f}",
        budget=d["budget"]["geometric mean"], verdict=verdict(s, d["budget"]), best=verdict(d["best summary"], d["budget"]),
        settings=settings(d), count=len(d["settings"]), crossing=crossing(peers),
        rms=by_rms(d), matched=matched(d), lost=lost(d), ranking=ranking(d), ablated=d["ablated"], ablation=ablation(d),
        arc=about.replace("\n", "\n> "), tuned=tuned(d), costs=costs(d),
        libraries=libraries(peers, d["budget"]), tuned_over_all=tuned_over_all(d, peers),
        settings_of_peers=len({(r["who"], r["sampler"]) for r in peers["rows"]} - _own(peers)), steps=steps(peers),
        cases=table(["case", "kind", "items", "rms of the data"], [tuple(row.values()) for row in d["cases"]]),
    )  # fmt: skip


def picture(d: Row, shown: int = 6) -> Any:
    """Error against calls: arc, the other named solvers of ours, and the best of the peers at each place; a PIL image."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    ink, pale = "#22303c", "#d5dbe0"
    lines = {"dpm-solver++": ("#2e86ab", "DPM-Solver++ 2M"), "unipc": ("#00798c", "UniPC"), "deis": ("#8d5a97", "DEIS"),
             "ddim": ("#9aa5ad", "DDIM")}  # fmt: skip
    made = Figure(figsize=(12, 6.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    names = _shown(d, shown)
    axes = made.subplots(2, -(-len(names) // 2), sharex=True)
    for ax, case in zip(axes.flat, names, strict=True):
        here = [row for row in d["rows"] if row["case"] == case and "median" in row]
        for spec, (color, label) in lines.items():
            rows = [row for row in here if (row["who"], row["sampler"]) == ("sfumato", spec)]
            ax.plot(
                [r["budget"] for r in rows], [r["median"] for r in rows], color=color, lw=1.2, label=f"{label}, ours"
            )
        rivals = [row for row in d["ratios"] if row["case"] == case]
        ax.plot([r["calls"] for r in rivals], [r["peer"] for r in rivals], color="#edae49", lw=2.2, marker="s", ms=4,
                label="best of diffusers at each point")  # fmt: skip
        rows = [row for row in here if (row["who"], row["sampler"]) == ("sfumato", "arc")]
        calls = [row["budget"] for row in rows]
        ax.fill_between(calls, [r["low"] for r in rows], [r["high"] for r in rows], color="#d1495b", alpha=0.15, lw=0)
        ax.plot(calls, [row["median"] for row in rows], color="#d1495b", lw=2.4, marker="o", ms=5, label="arc")
        better = [row for row in d["tuned"] if row["case"] == case]
        if better:
            ax.plot([r["budget"] for r in better], [r["median"] for r in better], color=ink, lw=0, marker="*", ms=9,
                    label="tuned for this model")  # fmt: skip
        ax.set_title(case, fontsize=10, fontweight="bold", color=ink, loc="left")
        ax.set(yscale="log", xticks=calls)
        ax.tick_params(colors=ink, labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(pale)
        ax.grid(color=pale, lw=0.5)
    for ax in axes[-1]:
        ax.set_xlabel("network calls", fontsize=9, color=ink)
    for ax in axes[:, 0]:
        ax.set_ylabel("median error", fontsize=9, color=ink)
    handles = {text: h for ax in axes.flat for h, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    made.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer).convert("RGB")


def _shown(d: Row, count: int) -> list[str]:
    """The trained cases, and the first exact ones."""
    trained = [row["case"] for row in d["cases"] if row["kind"] == "trained"]
    return [*[row["case"] for row in d["cases"] if row["kind"] == "exact"][: count - len(trained)], *trained]


def write() -> None:
    """Write the page and its picture."""
    d = json.loads(SOURCE.read_text("utf-8"))
    PAGE.write_text(page(d), "utf-8")
    picture(d).save(PICTURE, optimize=True)


if __name__ == "__main__":
    write()
