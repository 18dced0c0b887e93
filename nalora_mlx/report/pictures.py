"""PNG pictures of a report, for papers, mails and chats: light ground, no interaction."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_mlx.report import tables
from nalora_mlx.report.data import RunData, Table, short_layers
from nalora_mlx.report.page import NOISY, SCALARS, SMOOTHED_FROM, window
from nalora_mlx.report.palette import HEAT, LINES, POINTS, RUNS_LIGHT
from nalora_mlx.report.series import running_mean, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEATS = (
    "importance.mean",
    "misalignment",
    "mask.p90",
    "sparsity",
    "effective",
    "step_scale.mean",
    "multiplier.p90",
)
COLUMNS = 4  # heat maps side by side
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
    names = list(dict.fromkeys(name for run in with_layers for name in run.grids))
    regions = [name for name in names if name.startswith("occupancy.")]
    for file, wanted in (
        ("layers.png", [name for name in HEATS if name in names]),
        ("occupancy.png", regions),
    ):
        if wanted:
            drawn[file] = _heats([(run, name) for name in wanted for run in with_layers], len(runs) > 1)
    with_channels = [run for run in runs if run.channels]
    if with_channels:
        drawn["channels.png"] = _channels(with_channels, len(runs) > 1)
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
            if not several:
                ax.plot(*thinned(steps, losses), color=training, alpha=0.25, linewidth=0.8)
            losses = running_mean(losses, window(len(losses)))
        if len(losses):
            ax.plot(
                *thinned(steps, losses),
                color=training,
                linestyle=LINES[i],
                linewidth=1.5,
                label=f"{name}training",
            )
        if len(run.valid["step"]):
            ax.plot(
                run.valid["step"],
                run.valid["loss"],
                color=validation,
                marker=POINTS[i],
                markersize=4,
                linewidth=2,
                label=f"{name}validation",
            )
        if run.best:
            ax.plot(
                *run.best, marker="*", markersize=15, color=validation, markeredgecolor="white", linestyle=""
            )
            right = run.best[0] > 0.85 * run.last_step
            if not several:  # labels of several would cover each other
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
                linestyle=LINES[i],
                linewidth=1.5,
                label=run.name,
            )
        ax.set(title=title, xlabel="iteration", ylabel=unit)
        ax.set_ylim(bottom=0)
        if len(runs) > 1:
            ax.legend()


def _heats(maps: list[tuple[RunData, str]], several: bool) -> bytes:
    """Heat maps of statistics over layers: of several runs side by side, on one scale."""
    runs = len({id(run) for run, _ in maps})
    columns = min(runs * max(1, COLUMNS // runs), len(maps))
    grids = {
        name: [run.grids[name].values for run, n in maps if n == name and n in run.grids] for _, name in maps
    }

    def draw(axes: Any, _drawn: list[RunData]) -> None:
        for ax in axes.flat[len(maps) :]:
            ax.set_axis_off()
        for ax, (run, name) in zip(axes.flat, maps, strict=False):
            _, full, unit = tables.label(name)
            ax.set(title=f"{run.name}\n{_title(full)}" if several else _title(full), ylabel="layer")
            if name not in run.grids:
                ax.set_axis_off()
                continue
            ends = (0, 1) if name.startswith("occupancy.") else _ends(grids[name])
            _mesh(ax, run.grids[name], ends, unit)
            every = -(-len(run.layers) // 12)
            ax.set_yticks(range(0, len(run.layers), every), short_layers(run.layers)[::every])

    rows = -(-len(maps) // columns)
    return _png(draw, [], (3.7 * columns, 3.2 * rows), rows, columns)


def _channels(runs: list[RunData], several: bool) -> bytes:
    """Importance of channels in layers from the first to the last, a row for each run."""
    columns = min(COLUMNS, max(len(run.channels) for run in runs))

    def draw(axes: Any, runs: list[RunData]) -> None:
        for row, run in zip(axes, runs, strict=True):
            names = dict(zip(run.layers, short_layers(run.layers), strict=True))
            chosen = [
                list(run.channels)[i] for i in np.linspace(0, len(run.channels) - 1, columns).astype(int)
            ]
            for ax, path in zip(row, chosen, strict=True):
                table = run.channels[path]
                title = f"Importance, layer {names[path]}"
                ax.set(
                    title=f"{run.name}\n{title}" if several else title,
                    ylabel="channel, by importance at the end",
                )
                _mesh(ax, table, _ends([table.values]), "importance |φ'|")
                ax.invert_yaxis()
                ax.set_yticks([])

    return _png(draw, runs, (3.7 * columns, 3.2 * len(runs)), len(runs), columns)


def _mesh(ax: Any, table: Table, ends: tuple[float, float], unit: str) -> None:
    ax.grid(False)
    ax.set_xlabel("iteration")
    edges = np.concatenate([[0], table.steps])  # a report tells of the steps since the one before
    rows = np.arange(len(table.values) + 1) - 0.5
    low, high = ends
    mesh = ax.pcolormesh(edges, rows, table.values, cmap=HEAT, vmin=low, vmax=high, rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label=unit)


def _ends(grids: list[np.ndarray]) -> tuple[float, float]:
    return min(map(np.nanmin, grids)), max(map(np.nanmax, grids))


def _title(full: str) -> str:
    """What is measured, and below it of which channels."""
    return full.replace(", ", "\n", 1)
