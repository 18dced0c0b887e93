"""PNG plots of a report, for papers, mails and chats: light background, no interaction."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_mlx.report.advice import FEW_VALIDATIONS
from nalora_mlx.report.chart_data import (
    NOISY_SCALARS,
    SCALARS,
    SMOOTHING_MIN_REPORTS,
    has_scalar,
    smoothing_window,
)
from nalora_mlx.report.downsampling import downsample, running_mean
from nalora_mlx.report.formatting import format_number
from nalora_mlx.report.preferences import PreferenceChart, has_measure, loss_axis, preference_charts
from nalora_mlx.report.run_data import Grid, RunData, short_layers
from nalora_mlx.report.style import COLORMAP, MATPLOTLIB_DASHES, MATPLOTLIB_MARKERS, RUN_COLORS_LIGHT
from nalora_mlx.report.tables import statistic_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEATMAP_STATISTICS = (
    "importance.mean",
    "misalignment",
    "mask.p90",
    "sparsity",
    "effective",
    "step_scale.mean",
    "multiplier.p90",
)
MAX_HEATMAPS_PER_ROW = 4
MAX_TICKS = 6  # on an axis of a heat map; drawing them takes most of the time
RC_PARAMS: Any = {
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


def draw_plots(runs: list[RunData]) -> dict[str, bytes]:
    """Draw all plots for which there is data; return PNG files by name."""
    plots = {"loss.png": _draw_losses(runs)}
    scalars = [key for key in SCALARS if has_scalar(runs, key)]
    if scalars:
        plots["speed.png"] = _draw_scalars(runs, scalars)
    if charts := preference_charts(runs):
        plots["preferences.png"] = _draw_preferences(runs, charts)
    statistics = list(dict.fromkeys(name for run in runs if run.layers for name in run.grids))
    for file, names in (
        ("layers.png", [name for name in HEATMAP_STATISTICS if name in statistics]),
        ("occupancy.png", [name for name in statistics if name.startswith("occupancy.")]),
    ):
        if names:
            plots[file] = _draw_heatmaps(runs, names)
    if any(run.channels for run in runs):
        plots["channels.png"] = _draw_channels(runs)
    return plots


def _render(draw: Callable[[Any], None], size: tuple[float, float], rows: int = 1, columns: int = 1) -> bytes:
    """Create a figure of rows x columns axes, draw into them, and return it as PNG."""
    # Figure instead of pyplot: it needs no window system and leaves no figure open.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC_PARAMS):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(rows, columns, squeeze=False))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_losses(runs: list[RunData]) -> bytes:
    several = len(runs) > 1

    def draw(axes: Any) -> None:
        ax: Axes = axes[0, 0]
        for i, run in enumerate(runs):
            _plot_losses(ax, run, i, several)
        ax.set(xlabel="iteration", ylabel=loss_axis(runs))
        ax.margins(x=0.02)
        ax.legend(ncols=2 if several else 1)

    return _render(draw, (8, 4.2))


def _plot_losses(ax: "Axes", run: RunData, i: int, several: bool) -> None:
    color = RUN_COLORS_LIGHT[i]
    validation_color = color if several else RUN_COLORS_LIGHT[1]
    prefix = f"{run.name}: " if several else ""
    steps, losses = run.train["step"], run.train["loss"]
    if len(losses) >= SMOOTHING_MIN_REPORTS:
        if not several:
            ax.plot(*downsample(steps, losses), color=color, alpha=0.25, linewidth=0.8)
        losses = running_mean(losses, smoothing_window(len(losses)))
    if len(losses):
        ax.plot(
            *downsample(steps, losses),
            color=color,
            linestyle=MATPLOTLIB_DASHES[i],
            linewidth=1.5,
            label=f"{prefix}training",
        )
    if len(run.valid["step"]):
        ax.plot(
            run.valid["step"],
            run.valid["loss"],
            color=validation_color,
            marker=MATPLOTLIB_MARKERS[i],
            markersize=4 if len(run.valid["step"]) > FEW_VALIDATIONS else 7,
            # A line through few points looks like a curve, and there is none.
            linewidth=2 if len(run.valid["step"]) > FEW_VALIDATIONS else 0,
            label=f"{prefix}validation",
        )
    if run.best_validation is None:
        return
    step, loss = run.best_validation
    ax.plot(
        step, loss, marker="*", markersize=15, color=validation_color, markeredgecolor="white", linestyle=""
    )
    if not several:  # labels of several runs would overlap
        near_end = step > 0.85 * run.last_step
        ax.annotate(
            f"best {format_number(loss)}",
            (step, loss),
            xytext=(-6 if near_end else 6, 10),
            textcoords="offset points",
            ha="right" if near_end else "left",
        )


def _draw_scalars(runs: list[RunData], keys: list[str]) -> bytes:
    def draw(axes: Any) -> None:
        for ax in axes.flat[len(keys) :]:
            ax.set_axis_off()
        for ax, key in zip(axes.flat, keys, strict=False):
            for i, run in enumerate(runs):
                steps, values = run.train["step"], run.train[key]
                if key in NOISY_SCALARS and len(steps) >= SMOOTHING_MIN_REPORTS:
                    values = running_mean(values, smoothing_window(len(steps)))
                ax.plot(
                    *downsample(steps, values),
                    color=RUN_COLORS_LIGHT[i],
                    linestyle=MATPLOTLIB_DASHES[i],
                    linewidth=1.5,
                    label=run.name,
                )
            ax.set(title=SCALARS[key].title, xlabel="iteration", ylabel=SCALARS[key].axis)
            highest = max((np.nanmax(run.train[key], initial=0) for run in runs), default=0)
            ax.set_ylim(0, 1.12 * highest or None)  # a constant line stays clear of the frame
            if len(runs) > 1:
                ax.legend()

    return _render(draw, (10, 5.6), 2, 2)


def _draw_preferences(runs: list[RunData], charts: dict[str, PreferenceChart]) -> bytes:
    """Draw the measures of preference runs: training as lines, validation as points."""
    several = len(runs) > 1

    def draw(axes: Any) -> None:
        for ax in axes.flat[len(charts) :]:
            ax.set_axis_off()
        for ax, (name, chart) in zip(axes.flat, charts.items(), strict=False):
            for i, run in enumerate(runs):
                for n, (key, label) in enumerate(chart.measures.items()):
                    color = i if several else n
                    _plot_measure(ax, run, key, color, 2 if n else i, label)  # the second one is dotted
            ax.set(title=chart.title, xlabel="iteration", ylabel=chart.axis)
            if name == "accuracy":
                ax.set_ylim(0, 1.04)
            ax.legend(fontsize=8)

    def _plot_measure(ax: "Axes", run: RunData, key: str, color: int, dash: int, label: str) -> None:
        name = ", ".join(filter(None, (run.name if several else "", label)))
        for columns, where in ((run.train, "training"), (run.valid, "validation")):
            if not has_measure(columns, key):
                continue
            values, valid = columns[key], columns is run.valid
            if not valid and len(values) >= SMOOTHING_MIN_REPORTS:
                values = running_mean(values, smoothing_window(len(values)))
            few = valid and len(values) <= FEW_VALIDATIONS
            ax.plot(
                *downsample(columns["step"], values),
                color=RUN_COLORS_LIGHT[color],
                linestyle=MATPLOTLIB_DASHES[dash],
                linewidth=0 if few else 1 if valid else 1.5,
                marker=MATPLOTLIB_MARKERS[color] if valid else None,
                markersize=5,
                label=f"{name}, {where}" if name else where,
            )

    return _render(draw, (10, 5.6), 2, 2)


def _draw_heatmaps(runs: list[RunData], statistics: list[str]) -> bytes:
    """Draw heat maps over layers and iterations; those of one statistic are adjacent and share their color scale."""
    several = len(runs) > 1
    runs = [run for run in runs if run.layers]
    maps = [(run, name) for name in statistics for run in runs]
    columns = min(len(runs) * max(1, MAX_HEATMAPS_PER_ROW // len(runs)), len(maps))
    rows = -(-len(maps) // columns)

    def draw(axes: Any) -> None:
        for ax in axes.flat[len(maps) :]:
            ax.set_axis_off()
        for ax, (run, name) in zip(axes.flat, maps, strict=False):
            _, label, unit = statistic_label(name)
            title = label.replace(", ", "\n", 1)
            ax.set(title=f"{run.name}\n{title}" if several else title, ylabel="layer")
            if name not in run.grids:
                ax.set_axis_off()
                continue
            grids = [run.grids[name].values for run in runs if name in run.grids]
            limits = (0, 1) if name.startswith("occupancy.") else _limits(grids)
            _plot_heatmap(ax, run.grids[name], limits, unit)
            tick_step = -(-len(run.layers) // MAX_TICKS)
            ax.set_yticks(range(0, len(run.layers), tick_step), short_layers(run.layers)[::tick_step])

    return _render(draw, (3.7 * columns, 3.2 * rows), rows, columns)


def _draw_channels(runs: list[RunData]) -> bytes:
    """Draw the importance of channels in a few layers from the first to the last, a row for each run."""
    several = len(runs) > 1
    runs = [run for run in runs if run.channels]
    columns = min(MAX_HEATMAPS_PER_ROW, max(len(run.channels) for run in runs))

    def draw(axes: Any) -> None:
        for row, run in zip(axes, runs, strict=True):
            names = dict(zip(run.layers, short_layers(run.layers), strict=True))
            layers = list(run.channels)
            for ax, i in zip(row, np.linspace(0, len(layers) - 1, columns).astype(int), strict=True):
                title = f"Importance, layer {names[layers[i]]}"
                ax.set(
                    title=f"{run.name}\n{title}" if several else title,
                    ylabel="channel, by final importance",
                )
                grid = run.channels[layers[i]]
                _plot_heatmap(ax, grid, _limits([grid.values]), "importance |φ'|")
                ax.invert_yaxis()
                ax.set_yticks([])

    return _render(draw, (3.7 * columns, 3.2 * len(runs)), len(runs), columns)


def _plot_heatmap(ax: "Axes", grid: Grid, limits: tuple[float, float], unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.grid(False)
    ax.set_xlabel("iteration")
    edges = np.concatenate([[0], grid.steps])  # a report covers the steps since the previous one
    rows = np.arange(len(grid.values) + 1) - 0.5
    low, high = limits
    mesh = ax.pcolormesh(edges, rows, grid.values, cmap=COLORMAP, vmin=low, vmax=high, rasterized=True)
    ax.xaxis.set_major_locator(MaxNLocator(MAX_TICKS - 1))
    ax.figure.colorbar(mesh, ax=ax, label=unit, ticks=MaxNLocator(MAX_TICKS - 1))


def _limits(grids: list[np.ndarray]) -> tuple[float, float]:
    return min(map(np.nanmin, grids)), max(map(np.nanmax, grids))
