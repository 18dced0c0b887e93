"""What page.js draws: lines and heat maps of the runs, with few enough points that the page stays responsive."""

from typing import Any, NamedTuple

import numpy as np

from nalora_mlx.report.advice import FEW_VALIDATIONS
from nalora_mlx.report.downsampling import MAX_POINTS, downsample, running_mean
from nalora_mlx.report.preferences import has_measure, loss_axis, preference_charts
from nalora_mlx.report.run_data import MEASURES, Grid, RunData, short_layers
from nalora_mlx.report.style import COLORMAP, PLOTLY_DASHES, PLOTLY_MARKERS, REGION_POSITIONS
from nalora_mlx.report.tables import statistic_label


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
    "selection_change": Scalar("Selection change", "change of the selection per update", ".3g", ""),
}
NOISY_SCALARS = (
    "loss",
    "tokens_per_second",
    "gradient_norm",
    "selection_change",
    *MEASURES,
)  # smoothed; the raw values are pale
LOG_SCALE_RATIO = 10  # of the highest to the lowest loss
SMOOTHING_MIN_REPORTS = 60  # shorter runs are not smoothed
MAX_SCALAR_POINTS = 400  # of a line in the small charts


def has_scalar(runs: list[RunData], key: str) -> bool:
    """Return whether any run has values of a scalar."""
    return any(not np.isnan(run.train[key]).all() for run in runs)


def smoothing_window(reports: int) -> int:
    """Return the number of reports over which noisy lines are averaged."""
    return max(5, reports // 50)


def needs_log_scale(runs: list[RunData]) -> bool:
    """Return whether the losses of several runs come so close that only a log scale tells them apart."""
    losses = np.concatenate([each["loss"] for run in runs for each in (run.train, run.valid)])
    losses = losses[losses > 0]
    return len(runs) > 1 and len(losses) > 0 and bool(losses.max() > LOG_SCALE_RATIO * losses.min())


def last_step(runs: list[RunData]) -> int:
    """Return the last step of any run."""
    return max(run.last_step for run in runs)


def chart_data(
    runs: list[RunData], scalars: list[str], statistics: list[str], refresh: float | None
) -> dict[str, Any]:
    """Return everything that page.js draws, as JSON values."""
    regions = [name.partition(".")[2] for name in statistics if name.startswith("occupancy.")]
    return {
        "runs": [_run_data(run) for run in runs],
        "scalars": [
            {"key": key, "unit": SCALARS[key].axis, "format": SCALARS[key].format} for key in scalars
        ],
        "preferences": [
            {
                "key": name,
                "unit": chart.axis,
                "format": chart.format,
                "measures": list(chart.measures.items()),
            }
            for name, chart in preference_charts(runs).items()
        ],
        "lossAxis": loss_axis(runs),
        "statistics": {
            name: dict(zip(("label", "unit"), statistic_label(name)[1:], strict=True)) for name in statistics
        },
        "regions": list(dict.fromkeys(regions)),
        "markers": PLOTLY_MARKERS,
        "dashes": PLOTLY_DASHES,
        "colorScale": [
            [i / 16, _colormap(i / 16)] for i in range(17)
        ],  # finer than plotly's own of this name
        "regionColors": [_colormap(position) for position in REGION_POSITIONS],
        "lastStep": last_step(runs),
        "fewValidations": FEW_VALIDATIONS,
        "logScale": needs_log_scale(runs),
        "refresh": refresh,
        "storageKey": "nalora-report-",
    }


def _run_data(run: RunData) -> dict[str, Any]:
    steps = run.train["step"]
    keys = ("loss", *SCALARS, *(key for key in MEASURES if key in run.train))
    scalars = [key for key in keys if len(steps) and not np.isnan(run.train[key]).all()]
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
        "validMeasures": {
            key: _line(run.valid["step"], run.valid[key]) for key in MEASURES if has_measure(run.valid, key)
        },
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


def _colormap(position: float) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps[COLORMAP](position))
