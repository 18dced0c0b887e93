"""The HTML page of a report: one file that contains the plotting library and loads nothing from the network."""

import datetime
import json
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from nalora_mlx import __version__
from nalora_mlx.report import tables
from nalora_mlx.report.downsampling import MAX_POINTS, downsample, running_mean
from nalora_mlx.report.run_data import Grid, RunData, short_layers
from nalora_mlx.report.style import (
    COLORMAP,
    PLOTLY_DASHES,
    PLOTLY_MARKERS,
    REGION_POSITIONS,
    RUN_COLORS_DARK,
    RUN_COLORS_LIGHT,
)

GENERATOR = "nalora report"


class Scalar(NamedTuple):
    """A chart of one number per report."""

    title: str
    axis: str
    format: str  # of a number in the tooltip
    unit: str  # in a sentence


SCALARS = {  # by key in metrics.jsonl
    "learning_rate": Scalar("Learning rate", "learning rate", ".3e", ""),
    "tokens_per_second": Scalar("Speed", "tokens per second", ",.0f", " tokens per second"),
    "peak_memory_gb": Scalar("Peak memory", "peak memory (GB)", ".2f", " GB"),
    "gradient_norm": Scalar("Gradient norm", "norm of the gradient", ".3g", ""),
}
LAYER_CHARTS = (  # statistic, title, caption
    (
        "importance",
        "Importance",
        "|φ'| of a gate channel, smoothed over steps: how strongly it still responds.",
    ),
    ("mask", "Mask", "Mechanism 1 computes it from the importance. It is 1 during warm-up."),
    ("sparsity", "Mask sparsity", "Share of channels with a mask below 0.1, which hardly change."),
    ("effective", "Channels in effect", "Share of the channels over which the mask spreads, (Σm)² / FΣm²."),
    (
        "step_scale",
        "Step scale",
        "Mechanism 2 computes it from the partition: each region's share of tokens times its gamma, summed.",
    ),
    ("multiplier", "Step multiplier", "Mask times step scale, normalized: the factor on a channel's step."),
    ("misalignment", "Selection misalignment", "Share of the residual's effect that changes the selection."),
)
NOISY_SCALARS = (
    "loss",
    "tokens_per_second",
    "gradient_norm",
)  # smoothed, with the raw values in a pale color
SMOOTHING_MIN_REPORTS = 60  # shorter runs are not smoothed
MAX_SCALAR_POINTS = 400  # of a line in the small charts
FIRST_STATISTICS = ("importance.mean", "misalignment")  # at the top of the heat map's menu


def render_page(
    runs: list[RunData], answers: list[dict[str, Any]] | None = None, refresh: float | None = None
) -> str:
    """Render the page.

    Args:
        runs: one or more runs; several are compared.
        answers: for each prompt, "prompt" and "texts": pairs of a model's name and its answer.
        refresh: seconds after which the page reloads itself; None for never.
    """
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    package = files("nalora_mlx.report")
    html, css, script = (
        (package / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    names = ", ".join(run.name for run in runs)
    statistics = _ordered_statistics(runs)
    scalars = [key for key in SCALARS if has_scalar(runs, key)]
    loss_tables = [tables.loss_table(run, split) for run in runs for split in ("train", "valid")]
    facts = [make(runs) for make in (tables.settings_table, tables.data_table, tables.environment_table)]
    facts = [table for table in facts if table["rows"]]
    sections = [
        ("summary", "Summary"),
        ("loss", "Loss"),
        *([("speed", "Speed and memory")] if scalars else []),
        *([("na", "NA-LoRA"), ("layer", "Layers")] if statistics else []),
        *([("answers", "Answers")] if answers else []),
        *([("settings", "Settings")] if facts else []),
    ]
    data = json.dumps(_chart_data(runs, scalars, statistics, refresh), allow_nan=False, separators=(",", ":"))
    template = Environment(autoescape=True, trim_blocks=True).from_string(html)
    return template.render(
        generator=f"{GENERATOR} {__version__}",
        title=f"Run {names}" if len(runs) == 1 else f"Comparison of {names}",
        subtitle=_subtitle(runs),
        run_colors=Markup(_run_colors()),
        css=Markup(css),
        script=Markup(script),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        data=Markup(data.replace("<", "\\u003c")),  # a run's name cannot close the script element
        refresh=refresh,
        sections=sections,
        runs=[
            {
                "index": i,
                "name": run.name,
                "has_layers": bool(run.layers),
                "has_occupancy": any(name.startswith("occupancy.") for name in run.grids),
                "has_channels": bool(run.channels),
            }
            for i, run in enumerate(runs)
        ],
        summary=tables.summary(runs),
        last_step=_last_step(runs),
        loss_caption=tables.loss_caption(runs),
        loss_tables=[table for table in loss_tables if table],
        scalars=[
            {
                "key": key,
                "title": SCALARS[key].title,
                "caption": tables.scalar_caption(runs, key, SCALARS[key].unit),
            }
            for key in scalars
        ],
        statistics=_grouped(statistics),
        layers=list(dict.fromkeys(layer for run in runs for layer in short_layers(run.layers))),
        layer_charts=[
            chart
            for chart in LAYER_CHARTS
            if any(name.partition(".")[0] == chart[0] for run in runs for name in run.grids)
        ],
        layer_tables=[tables.layer_table(run) for run in runs if run.layers],
        answers=answers,
        facts=facts,
        footer=f"Written by nalora {__version__}. This file is self-contained and loads nothing from the network.",
    )


def has_scalar(runs: list[RunData], key: str) -> bool:
    """Return whether any run has values of a scalar."""
    return any(not np.isnan(run.train[key]).all() for run in runs)


def smoothing_window(reports: int) -> int:
    """Return the number of reports over which noisy lines are averaged."""
    return max(5, reports // 50)


def _last_step(runs: list[RunData]) -> int:
    return max(run.last_step for run in runs)


def _subtitle(runs: list[RunData]) -> str:
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    models = {str(run.settings["model"]) for run in runs if "model" in run.settings}
    base = f"Base model: {', '.join(sorted(models))}. " if models else ""
    methods = dict.fromkeys(run.method for run in runs if run.method)
    how = f" ({', '.join(methods)})" if methods else ""
    return f"{base}Fine-tuned on MLX{how}. Report of {now}."


# --- what page.js draws ------------------------------------------------------------------------------


def _chart_data(
    runs: list[RunData], scalars: list[str], statistics: list[str], refresh: float | None
) -> dict[str, Any]:
    regions = [name.partition(".")[2] for name in statistics if name.startswith("occupancy.")]
    return {
        "runs": [_run_data(run) for run in runs],
        "scalars": [
            {"key": key, "unit": SCALARS[key].axis, "format": SCALARS[key].format} for key in scalars
        ],
        "statistics": {
            name: dict(zip(("label", "unit"), tables.statistic_label(name)[1:], strict=True))
            for name in statistics
        },
        "regions": list(dict.fromkeys(regions)),
        "markers": PLOTLY_MARKERS,
        "dashes": PLOTLY_DASHES,
        "colorScale": [
            [i / 16, _colormap(i / 16)] for i in range(17)
        ],  # finer than plotly's own of this name
        "regionColors": [_colormap(position) for position in REGION_POSITIONS],
        "lastStep": _last_step(runs),
        "refresh": refresh,
        "storageKey": "nalora-report-",
    }


def _run_data(run: RunData) -> dict[str, Any]:
    steps = run.train["step"]
    scalars = [key for key in ("loss", *SCALARS) if len(steps) and not np.isnan(run.train[key]).all()]
    smooth = {}
    if len(steps) >= SMOOTHING_MIN_REPORTS:
        smooth = {
            key: running_mean(run.train[key], smoothing_window(len(steps)))
            for key in NOISY_SCALARS
            if key in scalars
        }
    max_points = {key: MAX_SCALAR_POINTS for key in scalars} | {"loss": MAX_POINTS}
    return {
        "name": run.name,
        "train": {key: _line(steps, run.train[key], max_points[key]) for key in scalars},
        "smooth": {key: _line(steps, values, MAX_SCALAR_POINTS) for key, values in smooth.items()},
        "valid": _line(run.valid["step"], run.valid["loss"]),
        "best": run.best_validation,
        "layers": short_layers(run.layers),
        "grids": {name: _grid(grid) for name, grid in run.grids.items()},
        "channels": {
            short: _grid(run.channels[path])
            for short, path in zip(short_layers(run.layers), run.layers, strict=True)
            if path in run.channels
        },
    }


def _line(steps: np.ndarray, values: np.ndarray, max_points: int = MAX_POINTS) -> list[list[float | None]]:
    x, y = downsample(steps, values, max_points)
    return [_numbers(x), _numbers(y)]


def _grid(grid: Grid) -> dict[str, Any]:
    return {"x": _numbers(grid.steps), "z": [_numbers(row) for row in grid.values]}


def _numbers(values: np.ndarray) -> list[float | None]:
    """Convert to JSON numbers with five significant digits, or to whole numbers; NaN becomes None."""
    return [
        None if not np.isfinite(v) else int(v) if v.is_integer() and abs(v) < 1e9 else float(f"{v:.5g}")
        for v in values.astype(float).tolist()
    ]


# --- menus and colors --------------------------------------------------------------------------------


def _ordered_statistics(runs: list[RunData]) -> list[str]:
    names = list(dict.fromkeys(name for run in runs for name in run.grids))
    first = [name for name in FIRST_STATISTICS if name in names]
    return first + [name for name in names if name not in first]


def _grouped(statistics: list[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the menu of the heat map: groups of (statistic, label)."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in statistics:
        group, label, _ = tables.statistic_label(name)
        groups.setdefault(group, []).append((name, label))
    return list(groups.items())


def _colormap(position: float) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps[COLORMAP](position))


def _run_colors() -> str:
    """Return the CSS variables --run-0, --run-1, ... of both themes."""

    def block(selector: str, colors: tuple[str, ...]) -> str:
        return f"{selector} {{ {' '.join(f'--run-{i}: {color};' for i, color in enumerate(colors))} }}"

    return block(":root", RUN_COLORS_LIGHT) + "\n" + block(':root[data-theme="dark"]', RUN_COLORS_DARK)
