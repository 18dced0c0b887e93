"""The HTML page: everything in one file, the plotting library too, and nothing fetched from anywhere."""

import datetime
import json
from importlib.resources import files
from typing import Any

import numpy as np

from nalora_mlx import __version__
from nalora_mlx.report import tables
from nalora_mlx.report.data import RunData, Table, short_layers
from nalora_mlx.report.palette import DASHES, HEAT, MARKERS, REGIONS, RUNS_DARK, RUNS_LIGHT
from nalora_mlx.report.series import MOST_POINTS, running_mean, thinned

GENERATOR = "nalora report"
# key in metrics.jsonl: title, axis, format of a number under the pointer, unit in a sentence
SCALARS = {
    "learning_rate": ("Learning rate", "learning rate", ".3e", ""),
    "tokens_per_second": ("Speed", "tokens per second", ",.0f", " tokens per second"),
    "peak_memory_gb": ("Peak memory", "peak memory (GB)", ".2f", " GB"),
    "gradient_norm": ("Gradient norm", "norm of the gradient", ".3g", ""),
}
BANDS = (
    ("importance", "Importance", "Mean |φ'| of a gate channel over steps: how much it still responds."),
    ("mask", "Mask", "What mechanism 1 makes of the importance, 1 in the warm-up."),
    ("sparsity", "Mask sparsity", "Share of channels whose mask is below 0.1, so that they hardly move."),
    ("effective", "Channels in effect", "Over what share of the channels the mask spreads, (Σm)² / FΣm²."),
    (
        "step_scale",
        "Step scale",
        "What mechanism 2 makes of the partition: each region's share times its gamma.",
    ),
    ("multiplier", "Step multiplier", "Mask times step scale, normalised: the factor on a channel's step."),
    ("misalignment", "Selection misalignment", "Share of the residual's effect that changes the selection."),
)
NOISY = ("loss", "tokens_per_second", "gradient_norm")  # drawn smoothed, and pale as reported
SMOOTHED_FROM = 60  # reports
POINTS = (400, MOST_POINTS)  # of a line in a small chart, and in the large one of the loss
FIRST = ("importance.mean", "misalignment")  # of the choices of the heat map


def page(
    runs: list[RunData], answers: list[dict[str, Any]] | None = None, refresh: float | None = None
) -> str:
    """Make the page.

    Args:
        runs: one or more; more are compared.
        answers: for each prompt its "prompt" and "texts", pairs of who answered and what.
        refresh: seconds after which the page loads itself anew; None for a page that stays.
    """
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    here = files("nalora_mlx.report")
    text = {name: (here / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    template = Environment(autoescape=True, trim_blocks=True).from_string(text["page.html"])
    statistics = _statistics(runs)
    scalars = [
        {"key": key, "title": title, "caption": tables.scalar_caption(runs, key, unit)}
        for key, (title, _, _, unit) in SCALARS.items()
        if any(not np.isnan(run.train[key]).all() for run in runs)
    ]
    payload = {
        "runs": [_payload(run) for run in runs],
        "scalars": [
            {"key": scalar["key"], "unit": SCALARS[scalar["key"]][1], "format": SCALARS[scalar["key"]][2]}
            for scalar in scalars
        ],
        "statistics": {
            name: dict(zip(("label", "unit"), tables.label(name)[1:], strict=True)) for name in statistics
        },
        "regions": list(dict.fromkeys(n.partition(".")[2] for n in statistics if n.startswith("occupancy."))),
        "markers": MARKERS,
        "dashes": DASHES,
        "heat": _heat_scale(),
        "tints": [_heat(place) for place in REGIONS],
        "last": max(run.last_step for run in runs),
        "refresh": refresh,
        "key": "nalora-report-",
    }
    layers = list(dict.fromkeys(layer for run in runs for layer in short_layers(run.layers)))
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
    names = ", ".join(run.name for run in runs)
    return template.render(
        generator=f"{GENERATOR} {__version__}",
        title=f"Run {names}" if len(runs) == 1 else f"Runs compared: {names}",
        subtitle=_subtitle(runs),
        colours=Markup(_colours()),
        css=Markup(text["page.css"]),
        script=Markup(text["page.js"]),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        # Nothing that a run is called can end the element early.
        payload=Markup(json.dumps(payload, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")),
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
        last_step=payload["last"],
        captions={"loss": tables.loss_caption(runs)},
        loss_tables=[table for table in loss_tables if table],
        scalars=scalars,
        statistics=_grouped(statistics),
        layers=layers,
        bands=[
            band
            for band in BANDS
            if any(name.partition(".")[0] == band[0] for run in runs for name in run.grids)
        ],
        layer_tables=[tables.layer_table(run) for run in runs if run.layers],
        answers=answers,
        facts_title="Settings, data and environment",
        facts=facts,
        footer=f"Written by nalora {__version__}. This file holds all that it shows and asks no network for anything.",
    )


def _subtitle(runs: list[RunData]) -> str:
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    model = {str(run.settings["model"]) for run in runs if "model" in run.settings}
    of = f"Base model: {', '.join(sorted(model))}. " if model else ""
    kinds = dict.fromkeys(run.kind for run in runs if run.kind)
    how = f" ({', '.join(kinds)})" if kinds else ""
    return f"{of}Fine-tuned on MLX{how}. Report of {now}."


def _payload(run: RunData) -> dict[str, Any]:
    """What the page's script draws of a run."""
    step = run.train["step"]
    known = [key for key in ("loss", *SCALARS) if len(step) and not np.isnan(run.train[key]).all()]
    smooth = {key: running_mean(run.train[key], window(len(step))) for key in NOISY if key in known}
    return {
        "name": run.name,
        "train": {key: _line(step, run.train[key], POINTS[key == "loss"]) for key in known},
        "smooth": {key: _line(step, y, POINTS[0]) for key, y in smooth.items()}
        if len(step) >= SMOOTHED_FROM
        else {},
        "valid": _line(run.valid["step"], run.valid["loss"]),
        "best": run.best,
        "layers": short_layers(run.layers),
        "grids": {name: _grid(table) for name, table in run.grids.items()},
        "channels": {
            short: _grid(run.channels[path])
            for short, path in zip(short_layers(run.layers), run.layers, strict=True)
            if path in run.channels
        },
    }


def window(reports: int) -> int:
    """Over how many reports a line that is noisy is smoothed."""
    return max(5, reports // 50)


def _line(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> list[list[float | None]]:
    x, y = thinned(steps, values, most)
    return [_numbers(x), _numbers(y)]


def _grid(table: Table) -> dict[str, Any]:
    return {"x": _numbers(table.steps), "z": [_numbers(row) for row in table.values]}


def _numbers(values: np.ndarray) -> list[float | None]:
    """Five digits are more than a screen shows; whole numbers stay whole."""
    return [
        None if not np.isfinite(v) else int(v) if v.is_integer() and abs(v) < 1e9 else float(f"{v:.5g}")
        for v in values.astype(float).tolist()
    ]


def _statistics(runs: list[RunData]) -> list[str]:
    names = list(dict.fromkeys(name for run in runs for name in run.grids))
    return [*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST)]


def _grouped(names: list[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        group, full, _ = tables.label(name)
        groups.setdefault(group, []).append((name, full))
    return list(groups.items())


def _heat_scale() -> list[list[Any]]:
    """The colour scale of the pictures, at 17 places: plotly's own of this name has fewer."""
    return [[i / 16, _heat(i / 16)] for i in range(17)]


def _heat(place: float) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps[HEAT](place))


def _colours() -> str:
    def block(selector: str, colours: tuple[str, ...]) -> str:
        return f"{selector} {{ {' '.join(f'--run-{i}: {c};' for i, c in enumerate(colours))} }}"

    return block(":root", RUNS_LIGHT) + "\n" + block(':root[data-theme="dark"]', RUNS_DARK)
