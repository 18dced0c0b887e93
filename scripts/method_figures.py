"""Draw docs/images/phi.svg: phi, phi', rho and kappa of each activation, with the regions of its partition.

Usage: python scripts/method_figures.py [--check]

--check only says whether the picture was drawn from what the activations are now, by this script.
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

PICTURE = ROOT / "docs" / "images" / "phi.svg"
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
COLOURS = {"phi": "#1b1b1b", "derivative": "#0072b2", "selection": "#009e73", "homogeneity": "#d55e00"}
SHADES = {"suppressed": "#d9d9d9", "dead": "#d9d9d9", "transition": "#fff1c9", "homogeneous": "#dcebf7"}


def curve(activation: Activation, name: str, z: np.ndarray) -> np.ndarray | None:
    """Values of one function of an activation; None if it has none."""
    function = getattr(activation, name)
    return None if function is None else np.array(function(mx.array(z.astype(np.float32))))


def source() -> str:
    """What the picture is made from: values at a few points, the partitions, and this script."""
    points = np.array([-3.3, -1.1, -0.4, 0.6, 2.7])
    said = [hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]]
    for row in ACTIVATIONS.values():
        said += [row.name, *row.regions, *(f"{b:.3f}" for b in row.boundaries)]
        for name in CURVES:
            values = curve(row, name, points)
            said.append(name if values is None else name + "".join(f" {value:+.3f}" for value in values))
    return "; ".join(said)


def draw() -> None:
    """Draw and write."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "phi"  # the same text each time
    figure, grid = pyplot.subplots(3, 2, figsize=(10, 10.5), sharex=True, layout="constrained")
    for axes, row in zip(grid.flat, ACTIVATIONS.values(), strict=True):
        edges = [Z[0], *row.boundaries, Z[-1]]
        for region, low, high in zip(row.regions, edges, edges[1:], strict=False):
            axes.axvspan(low, high, color=SHADES[region], linewidth=0)
            axes.text((low + high) / 2, -1.85, region, ha="center", fontsize=8, color="#444444")
        axes.axhline(0, color="#888888", linewidth=0.6)
        for name in CURVES:
            values = curve(row, name, Z)
            if values is not None:
                style = "--" if name == "homogeneity" else "-"
                axes.plot(Z, values, style, color=COLOURS[name], linewidth=1.6, label=SYMBOLS[name])
        axes.set(title=FORMULAS[row.name], ylim=(-2, 3), xlim=(Z[0], Z[-1]))
        axes.legend(loc="upper left", fontsize=9, framealpha=0.9)
    for axes in grid[-1]:
        axes.set_xlabel("z")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None, "Description": source()})


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            0
            if PICTURE.exists() and source() in PICTURE.read_text()
            else f"{PICTURE.relative_to(ROOT)} is out of date"
        )
    draw()
    print(f"wrote {PICTURE.relative_to(ROOT)}")
