"""The HTML page of a report: one file that contains the plotting library and loads nothing from the network."""

import datetime
import json
from importlib.resources import files
from typing import Any

from nalora_mlx import __version__
from nalora_mlx.report import answers, result, tables
from nalora_mlx.report.advice import LEVELS, Advice, advise
from nalora_mlx.report.chart_data import SCALARS, chart_data, has_scalar, last_step
from nalora_mlx.report.evaluations import LEGEND, evaluation_sections
from nalora_mlx.report.preferences import CHARTS, caption, preference_charts
from nalora_mlx.report.run_data import RunData, short_layers
from nalora_mlx.report.style import RUN_COLORS_DARK, RUN_COLORS_LIGHT

GENERATOR = "nalora report"
SPEED_SCALARS = ("tokens_per_second", "peak_memory_gb")  # the others are folded below the loss
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
FIRST_STATISTICS = ("importance.mean", "misalignment")  # at the top of the heat map's menu


def render_page(runs: list[RunData], refresh: float | None = None, card: str | None = None) -> str:
    """Render the page.

    Args:
        runs: one or more runs; several are compared.
        refresh: seconds after which the page reloads itself; None for never.
        card: name of an image to share, in the page's directory.
    """
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    package = files("nalora_mlx.report")
    html, css, script = (
        (package / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    statistics = _ordered_statistics(runs)
    scalars = [key for key in SCALARS if has_scalar(runs, key)]
    loss_tables = [tables.loss_table(run, split) for run in runs for split in ("train", "valid")]
    found, evaluated = answers.cards(runs), evaluation_sections(runs)
    facts = [make(runs) for make in (tables.settings_table, tables.data_table, tables.environment_table)]
    facts = [table for table in facts if table["rows"]]
    sections = [
        ("result", "Result"),
        *([("answers", "Answers")] if found else []),
        *([("evaluation", "Evaluation")] if evaluated else []),
        *([("preferences", "Preferences")] if preference_charts(runs) else []),
        ("loss", "Loss"),
        *([("speed", "Speed")] if set(scalars) & set(SPEED_SCALARS) else []),
        *([("na", "NA-LoRA")] if statistics else []),
        *([("settings", "Settings")] if facts else []),
    ]
    data = json.dumps(chart_data(runs, scalars, statistics, refresh), allow_nan=False, separators=(",", ":"))
    template = Environment(autoescape=True, trim_blocks=True).from_string(html)
    return template.render(
        generator=f"{GENERATOR} {__version__}",
        title=result.title(runs),
        subtitle=result.subtitle(runs),
        description=_description(runs),
        card=card,
        run_colors=Markup(_run_colors()),
        css=Markup(css),
        script=Markup(script),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        data=Markup(data.replace("<", "\\u003c")),  # a run's name cannot close the script element
        refresh=refresh,
        sections=sections,
        runs=[_run(run, i, runs) for i, run in enumerate(runs)],
        advice=_advice(runs),
        comparison=result.comparison(runs) if len(runs) > 1 else None,
        differing=tables.differing_settings(runs),
        cards=found,
        cards_summary=answers.summary(runs),
        card_rows=max((1 + len(card.answers) + (not card.all_same) for card in found), default=0),
        cards_legend=answers.LEGEND if answers.has_marks(found) else "",
        evaluations=evaluated,
        evaluations_legend=LEGEND,
        preferences=[_preference_chart(runs, name) for name in preference_charts(runs)],
        last_step=last_step(runs),
        loss_caption=tables.loss_caption(runs),
        loss_tables=[table for table in loss_tables if table],
        speed=[_scalar(runs, key) for key in scalars if key in SPEED_SCALARS],
        training=[_scalar(runs, key) for key in scalars if key not in SPEED_SCALARS],
        statistics=_grouped(statistics),
        na_sentence=tables.na_sentence(runs),
        layers=list(dict.fromkeys(layer for run in runs for layer in short_layers(run.layers))),
        layer_charts=[
            chart
            for chart in LAYER_CHARTS
            if any(name.partition(".")[0] == chart[0] for run in runs for name in run.grids)
        ],
        layer_tables=[tables.layer_table(run) for run in runs if run.layers],
        facts=facts,
        now=datetime.datetime.now().astimezone().strftime("%-d %B %Y, %H:%M"),
        version=__version__,
    )


def _run(run: RunData, index: int, runs: list[RunData]) -> dict[str, Any]:
    return {
        "index": index,
        "name": run.name,
        "headline": result.headline(run),
        "facts": result.facts(run),
        "best": index in result.best_runs(runs),
        "has_layers": bool(run.layers),
        "has_occupancy": any(name.startswith("occupancy.") for name in run.grids),
        "has_channels": bool(run.channels),
    }


def _advice(runs: list[RunData]) -> list[tuple[Advice, list[int]]]:
    """Return the advice on all runs, warnings first, each with the indices of the runs that it is for."""
    found: dict[Advice, list[int]] = {}
    for i, run in enumerate(runs):
        for advice in advise(run):
            found.setdefault(advice, []).append(i)
    return sorted(found.items(), key=lambda item: LEVELS.index(item[0].level))


def _scalar(runs: list[RunData], key: str) -> dict[str, str]:
    scalar = SCALARS[key]
    return {
        "key": key,
        "title": scalar.title,
        "caption": tables.scalar_caption(runs, key, scalar.unit),
    }


def _preference_chart(runs: list[RunData], name: str) -> dict[str, str]:
    return {"key": name, "title": CHARTS[name].title, "caption": caption(runs, name)}


def _description(runs: list[RunData]) -> str:
    """Return the result in a sentence, for a preview of the page."""
    if len(runs) > 1:
        return ". ".join(result.comparison(runs))
    headline = result.headline(runs[0])
    return f"{headline.name} {headline.text}. {headline.words}"


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


def _run_colors() -> str:
    """Return the CSS variables --run-0, --run-1, ... of both themes."""

    def block(selector: str, colors: tuple[str, ...]) -> str:
        return f"{selector} {{ {' '.join(f'--run-{i}: {color};' for i, color in enumerate(colors))} }}"

    return block(":root", RUN_COLORS_LIGHT) + "\n" + block(':root[data-theme="dark"]', RUN_COLORS_DARK)
