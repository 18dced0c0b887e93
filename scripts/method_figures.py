"""Draw docs/images/phi.svg, with phi, phi', rho and kappa of each activation and the regions of its partition.

Usage: python scripts/method_figures.py [--check]

With --check, draws nothing and fails if the figure is out of date. The description in the SVG records what it was made
from: this script and sampled values of the activations.
"""

import hashlib
import sys
from pathlib import Path

import matplotlib
import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nalora_mlx.ops.activations import ACTIVATIONS, Activation  # noqa: E402

FIGURE = ROOT / "docs" / "images" / "phi.svg"
Z = np.linspace(-4, 4, 401)
FORMULAS = {
    "silu": r"SiLU: $\phi = z\,\sigma(z)$",
    "gelu": r"GELU: $\phi = z\,\Phi(z)$",
    "gelu_tanh": "GELU, tanh form",
    "relu": r"ReLU: $\phi = \max(z, 0)$",
    "relu2": r"ReLU$^2$: $\phi = \max(z, 0)^2$",
    "sigmoid": r"sigmoid: $\phi = \sigma(z)$, not self-gated",
}
CURVES = ("phi", "derivative", "selection", "homogeneity")
SYMBOLS = {"phi": r"$\phi$", "derivative": r"$\phi'$", "selection": r"$\rho$", "homogeneity": r"$\kappa$"}
COLORS = {"phi": "#1b1b1b", "derivative": "#0072b2", "selection": "#009e73", "homogeneity": "#d55e00"}
SHADES = {"suppressed": "#d9d9d9", "dead": "#d9d9d9", "transition": "#fff1c9", "homogeneous": "#dcebf7"}


def curve(activation: Activation, name: str, z: np.ndarray) -> np.ndarray | None:
    """Return the values of one of an activation's functions, or None if the activation does not have it."""
    function = getattr(activation, name)
    return None if function is None else np.array(function(mx.array(z.astype(np.float32))))


def source() -> str:
    """Return a text that changes if the figure does: a hash of this script, the partitions, and sampled values."""
    points = np.array([-3.3, -1.1, -0.4, 0.6, 2.7])
    parts = [hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]]
    for activation in ACTIVATIONS.values():
        parts += [activation.name, *activation.regions, *(f"{b:.3f}" for b in activation.boundaries)]
        for name in CURVES:
            values = curve(activation, name, points)
            parts.append(name if values is None else name + "".join(f" {value:+.3f}" for value in values))
    return "; ".join(parts)


def draw() -> None:
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "phi"  # makes the output reproducible
    figure, grid = pyplot.subplots(3, 2, figsize=(10, 10.5), sharex=True, layout="constrained")
    for axes, activation in zip(grid.flat, ACTIVATIONS.values(), strict=True):
        edges = [Z[0], *activation.boundaries, Z[-1]]
        for region, low, high in zip(activation.regions, edges, edges[1:], strict=False):
            axes.axvspan(low, high, color=SHADES[region], linewidth=0)
            axes.text((low + high) / 2, -1.85, region, ha="center", fontsize=8, color="#444444")
        axes.axhline(0, color="#888888", linewidth=0.6)
        for name in CURVES:
            values = curve(activation, name, Z)
            if values is not None:
                style = "--" if name == "homogeneity" else "-"
                axes.plot(Z, values, style, color=COLORS[name], linewidth=1.6, label=SYMBOLS[name])
        axes.set(title=FORMULAS[activation.name], ylim=(-2, 3), xlim=(Z[0], Z[-1]))
        axes.legend(loc="upper left", fontsize=9, framealpha=0.9)
    for axes in grid[-1]:
        axes.set_xlabel("z")
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None, "Description": source()})


if __name__ == "__main__":
    if "--check" in sys.argv:
        up_to_date = FIGURE.exists() and source() in FIGURE.read_text()
        sys.exit(
            0
            if up_to_date
            else f"{FIGURE.relative_to(ROOT)} is out of date; run python scripts/method_figures.py"
        )
    draw()
    print(f"wrote {FIGURE.relative_to(ROOT)}")
