"""PNG pictures of a report, for papers, mails and chats: light ground, no interaction."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_mlx.report import tables
from nalora_mlx.report.data import RunData, short_layers
from nalora_mlx.report.page import NOISY, SCALARS, SMOOTHED_FROM, window
from nalora_mlx.report.palette import HEAT, RUNS_LIGHT
from nalora_mlx.report.series import running_mean, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = ("o", "s", "D", "^", "P", "X", "p", "h")  # as those of the page
DASHES = ("-", "--", ":", "-.")
HEATS = ("importance.mean", "multiplier.p90", "misalignment", "occupancy.transition")
STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.dpi": 144,
    "savefig.facecolor": "white",
}


def pictures(runs: list[RunData]) -> dict[str, bytes]:
    """Draw the pictures that there is something for; PNG files by name."""
    drawn = {"loss.png": _png(_loss, runs, (8, 4.2), 1, 1)}
    keys = [key for key in SCALARS if any(not np.isnan(run.train[key]).all() for run in runs)]
    if keys:
        drawn["speed.png"] = _png(lambda axes, runs: _scalars(axes, runs, keys), runs, (10, 5.6), 2, 2)
    with_layers = [run for run in runs if run.layers]
    heats = [name for name in HEATS if any(name in run.grids for run in with_layers)]
    if heats:
        rows, columns = len(with_layers), len(heats)
        drawn["layers.png"] = _png(
            lambda axes, runs: _heats(axes, runs, heats),
            with_layers,
            (3.7 * columns, 3.4 * rows),
            rows,
            columns,
        )
    return drawn


def _png(
    draw: Callable[[Any, list[RunData]], None],
    runs: list[RunData],
    size: tuple[float, float],
    rows: int,
    columns: int,
) -> bytes:
    # The class Figure itself, not pyplot: no window system is asked for, and nothing stays open.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        draw(axes, runs)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _loss(axes: Any, runs: list[RunData]) -> None:
    ax: Axes = axes[0, 0]
    several = len(runs) > 1
    for i, run in enumerate(runs):
        training = RUNS_LIGHT[i]
        validation = training if several else RUNS_LIGHT[1]
        name = f"{run.name}: " if several else ""
        steps, losses = run.train["step"], run.train["loss"]
        if len(losses) >= SMOOTHED_FROM:
            ax.plot(*thinned(steps, losses), color=training, alpha=0.25, linewidth=0.8)
            losses = running_mean(losses, window(len(losses)))
        if len(losses):
            ax.plot(*thinned(steps, losses), color=training, linewidth=1.5, label=f"{name}training")
        if len(run.valid["step"]):
            ax.plot(
                run.valid["step"],
                run.valid["loss"],
                color=validation,
                linestyle=":" if several else "-",
                marker=MARKERS[i],
                markersize=4,
                linewidth=2,
                label=f"{name}validation",
            )
        if run.best:
            ax.plot(
                *run.best, marker="*", markersize=15, color=validation, markeredgecolor="white", linestyle=""
            )
            right = run.best[0] > 0.85 * run.last_step
            ax.annotate(
                f"best {tables.number(run.best[1])}",
                run.best,
                xytext=(-6 if right else 6, 10),
                textcoords="offset points",
                ha="right" if right else "left",
            )
    ax.set(xlabel="iteration", ylabel="loss (nats per token)")
    ax.margins(x=0.02)
    ax.legend(ncols=2 if several else 1)


def _scalars(axes: Any, runs: list[RunData], keys: list[str]) -> None:
    for ax, key in zip(axes.flat, [*keys, *[None] * (axes.size - len(keys))], strict=True):
        if key is None:
            ax.set_axis_off()
            continue
        title, unit, _, _ = SCALARS[key]
        for i, run in enumerate(runs):
            steps, values = run.train["step"], run.train[key]
            if key in NOISY and len(steps) >= SMOOTHED_FROM:
                values = running_mean(values, window(len(steps)))
            ax.plot(
                *thinned(steps, values),
                color=RUNS_LIGHT[i],
                linestyle=DASHES[i % 4],
                linewidth=1.5,
                label=run.name,
            )
        ax.set(title=title, xlabel="iteration", ylabel=unit)
        ax.set_ylim(bottom=0)
        if len(runs) > 1:
            ax.legend()


def _heats(axes: Any, runs: list[RunData], names: list[str]) -> None:
    for column, name in enumerate(names):
        _, full, unit = tables.label(name)
        shown = [run.grids[name].values for run in runs if name in run.grids]
        low, high = min(map(np.nanmin, shown)), max(map(np.nanmax, shown))
        for ax, run in zip(axes[:, column], runs, strict=True):
            ax.grid(False)
            ax.set(title=f"{run.name}\n{full}" if len(runs) > 1 else full, xlabel="iteration", ylabel="layer")
            if name not in run.grids:
                ax.set_axis_off()
                continue
            table = run.grids[name]
            count = len(table.values)
            edges = np.concatenate([[0], table.steps])  # a report tells of the steps since the one before
            mesh = ax.pcolormesh(
                edges,
                np.arange(count + 1) - 0.5,
                table.values,
                cmap=HEAT,
                vmin=low,
                vmax=high,
                rasterized=True,
            )
            every = -(-count // 12)
            ax.set_yticks(range(0, count, every), short_layers(run.layers)[::every])
            ax.figure.colorbar(mesh, ax=ax, label=unit)
