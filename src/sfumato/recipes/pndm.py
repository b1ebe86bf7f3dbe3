"""PNDM: Adams' weights for the gradient and DDIM's exact transfer for the state."""

from __future__ import annotations

from typing import Any

from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._digits import DATA, GREY, Bed, Distance, draw, exact, network, slope, strip

STEPS = (10, 20, 50, 100, 250)
SOLVERS = {
    "DDIM": ("ddim", plots.INK, "-"),
    "Adams-Bashforth 4 on dx/dt": ("dpm-solver++(order=4, form='flow', variable='time')", GREY, "-"),
    "S-PNDM": ("s-pndm", plots.THIRD, "-"),
    "PLMS": ("plms", plots.SECOND, "--"),
    "F-PNDM": ("pndm", plots.ACCENT, "-"),
}
CITATION = """@inproceedings{liu2022pseudo,
  title = {Pseudo Numerical Methods for Diffusion Models on Manifolds},
  author = {Liu, Luping and Ren, Yi and Lin, Zhijie and Zhao, Zhou},
  booktitle = {ICLR}, year = {2022}
}"""


def picture(curves: dict[str, Any], bed: Bed, shown: dict[str, tuple[str, int, float]]) -> Any:
    """Error against calls with the exact belief, and what the bundled network draws."""
    with plots.style():
        made = plots.figure(12, 5.2)
        left, right = made.subfigures(1, 2, width_ratios=(1.25, 1))
        ax = left.subplots()
        lines = {name: (curves[name], colour, line) for name, (_, colour, line) in SOLVERS.items()}
        draw(
            ax,
            lines,
            title="exact belief of digits",
            xlabel="calls of the denoiser",
            ylabel="median error of the end point",
        )
        ax.legend(loc="lower left")
        for axis, (name, (spec, steps, fd)) in zip(right.subplots(len(shown)), shown.items(), strict=True):
            ends, calls = bed.run(spec, steps)
            strip(axis, ends[:56], f"{name}: {calls:g} calls, Fréchet distance {fd:.3f}", 14)
        return plots.image(made)


@recipe(
    "pndm",
    kind="solver",
    claim="Pseudo linear multistep methods are of order 2 where DDIM is of order 1, so 50 steps of F-PNDM are nearer to the end point "
    "than 250 of DDIM, and its samples at 50 steps are no worse than DDIM's at 250.",
    baseline="DDIM with up to 1000 steps, on the same uniform times and starts; Adams-Bashforth on dx/dt beside it",
    citation=CITATION,
)
def pndm(seed: int) -> Findings:
    """Order, end points and samples of pseudo linear multistep methods beside DDIM."""
    bed = exact(seed, 1, fine=200)
    curves = {name: bed.curve(spec, STEPS) for name, (spec, _, _) in SOLVERS.items()}
    curves["DDIM"] += bed.curve("ddim", (1000,))
    checks = [
        Check(f"order of {name}, 50 to 250 steps", slope(curves[name][2:5]), None, f"{low} <= ours <= {high}")
        for name, low, high in (("S-PNDM", 1.6, 2.4), ("F-PNDM", 1.6, 2.4), ("DDIM", 0.8, 1.2))
    ]
    many = {n: bed.error("ddim", n) for n in (250, 1000)}
    checks += [
        Check("error of F-PNDM, 50 steps, against DDIM, 250", bed.error("pndm", 50), many[250], "ours < baseline"),
        Check(
            "error of S-PNDM, 250 steps, against DDIM, 1000", bed.error("s-pndm", 250), many[1000], "ours < baseline"
        ),
    ]
    net, distance = network(seed, 2, 256), Distance()
    shown = {"DDIM": ("ddim", 50), "F-PNDM": ("pndm", 50), "DDIM, many steps": ("ddim", 250)}
    fd = {name: distance(net.run(spec, steps)[0]) for name, (spec, steps) in shown.items()}
    checks += [
        Check("network: Fréchet distance, F-PNDM and DDIM, 50 steps", fd["F-PNDM"], fd["DDIM"], "ours <= baseline"),
        Check(
            "network: F-PNDM, 50 steps, and DDIM, 250", fd["F-PNDM"], fd["DDIM, many steps"], "ours <= 1.05 * baseline"
        ),
    ]
    classical = SOLVERS["Adams-Bashforth 4 on dx/dt"][0]
    ratios = [b.error("pndm", 50) / b.error(classical, 50) for b in (bed, net)]
    return Findings(
        checks,
        nfe={"DDIM": 50, "F-PNDM": 59, "S-PNDM": 51, "PLMS": 51},
        data=f"{DATA}; 256 starts. For the network 256 starts and the 297 digits it has not seen",
        model="exact belief under VP, t from 1 to 0.001; bundled digits network, unconditional",
        notes="Errors are medians over items to a reference of order 4. Not a condition: the error of F-PNDM over that of the classical "
        f"Adams-Bashforth method at 50 steps is {ratios[0]:.2f} with the exact belief and {ratios[1]:.2f} with the network (below 1 "
        "the pseudo transfer helps).",
        picture=picture(curves, net, {name: (*pair, fd[name]) for name, pair in shown.items()}),
    )
