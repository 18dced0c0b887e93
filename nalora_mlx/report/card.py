"""card.png: the result of a run on an image of 1200 x 630 pixels, the size that chats and networks preview."""

import base64
import io
import unicodedata
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_mlx.report import result
from nalora_mlx.report.advice import FEW_VALIDATIONS
from nalora_mlx.report.answers import same_text, similarity
from nalora_mlx.report.chart_data import SMOOTHING_MIN_REPORTS, needs_log_scale, smoothing_window
from nalora_mlx.report.downsampling import downsample, running_mean
from nalora_mlx.report.run_data import RunData
from nalora_mlx.report.style import MATPLOTLIB_DASHES, RUN_COLORS_LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CARD = "card.png"
WIDTH, HEIGHT, DPI = 1200, 630, 100
MARGIN = 56
THUMBNAIL = 76  # pixels of an image's longer side
TEXT, MUTED, LINE, TINT = "#1a1f27", "#56606e", "#e1e5ea", "#eef4fa"
ACCENT = RUN_COLORS_LIGHT[0]
# The first comes with matplotlib. The others are used if the system has them: for Chinese, Japanese and Korean.
FONTS = (
    *(
        "DejaVu Sans",
        "Noto Sans CJK SC",
        "Noto Sans CJK JP",
        "Hiragino Sans",
        "PingFang SC",
        "Arial Unicode MS",
    ),
    *("Apple SD Gothic Neo", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei"),
)


def draw_card(runs: list[RunData]) -> bytes:
    """Draw the card of a run, or of several compared; return it as PNG."""
    import matplotlib

    with matplotlib.rc_context({"font.family": installed_fonts(), "axes.unicode_minus": False}):
        card = _Card()
        if len(runs) == 1:
            _draw_run(card, runs[0])
        else:
            _draw_comparison(card, runs)
        return card.png()


class _Card:
    """A figure whose coordinates are pixels from the top left corner."""

    def __init__(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)

    def png(self) -> bytes:
        """Return the image."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()

    def text(self, x: float, top: float, text: str, size: float, **more: Any) -> float:
        """Write a line whose font has a height of `size` pixels; return its right end."""
        points = size * 72 / DPI
        # Not mathtext: a text may contain dollar signs.
        artist = self.figure.text(
            x / WIDTH,
            1 - (top + size) / HEIGHT,
            text,
            size=points,
            parse_math=False,
            **{"color": TEXT, **more},
        )
        return x + artist.get_window_extent(self.canvas.get_renderer()).width

    def width(self, text: str, size: float, weight: str = "normal") -> float:
        """Return the width of a line in pixels."""
        from matplotlib.font_manager import FontProperties

        properties = FontProperties(family=installed_fonts(), size=size * 72 / DPI, weight=weight)
        return self.canvas.get_renderer().get_text_width_height_descent(text, properties, False)[0]

    def fitted(self, text: str, size: float, width: float, weight: str = "normal") -> str:
        """Return a text, cut with an ellipsis if it is wider than `width`."""
        if self.width(text, size, weight) <= width:
            return text
        low, high = 0, len(text)  # the most characters that fit, by bisection
        while low < high:
            middle = (low + high + 1) // 2
            if self.width(f"{text[:middle].rstrip()}…", size, weight) <= width:
                low = middle
            else:
                high = middle - 1
        return f"{text[:low].rstrip()}…"

    def paragraph(
        self, x: float, top: float, text: str, size: float, width: float, lines: int, **more: Any
    ) -> None:
        """Write a text on at most `lines` lines."""
        for i, line in enumerate(self.wrapped(text, size, width, lines)):
            self.text(x, top + 1.42 * size * i, line, size, **more)

    def wrapped(self, text: str, size: float, width: float, lines: int) -> list[str]:
        """Break a text into lines; the last one ends with an ellipsis if there are more."""
        found: list[str] = []
        # So many characters never fit, and measuring them takes time.
        for paragraph in text[: lines * 200].split("\n"):
            line = ""
            for word in _words(paragraph):
                if line and self.width((line + word).rstrip(), size) > width:
                    found.append(line.rstrip())
                    line = ""
                line += word
            found.append(line.rstrip())
        found = [line for line in found if line]
        if len(found) > lines or len(text) > lines * 200:
            found = [*found[: lines - 1], f"{found[min(lines, len(found)) - 1]} …"]
        return [self.fitted(line, size, width) for line in found]

    def box(self, x: float, top: float, width: float, height: float, color: str) -> None:
        """Draw a rectangle with round corners."""
        from matplotlib.patches import FancyBboxPatch
        from matplotlib.transforms import Affine2D

        pixels = Affine2D().scale(1 / WIDTH, -1 / HEIGHT).translate(0, 1) + self.figure.transFigure
        style = "round,pad=0,rounding_size=14"
        patch = FancyBboxPatch(
            (x, top), width, height, boxstyle=style, facecolor=color, edgecolor="none", transform=pixels
        )
        self.figure.add_artist(patch)

    def image(self, x: float, top: float, size: float, uri: str) -> None:
        """Draw the image of a data URI, with its longer side of `size` pixels."""
        import matplotlib.image

        data = base64.b64decode(uri.partition(",")[2])
        pixels = matplotlib.image.imread(io.BytesIO(data), format=uri.split("/")[1].partition(";")[0])
        scale = size / max(pixels.shape[:2])
        height, width = pixels.shape[0] * scale, pixels.shape[1] * scale
        place = (x / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT)
        axes = self.figure.add_axes(place, zorder=2)  # above the box
        axes.imshow(pixels, aspect="auto")
        axes.set_axis_off()

    def axes(self, x: float, top: float, width: float, height: float) -> "Axes":
        """Add a chart."""
        place = (x / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT)
        axes = self.figure.add_axes(place)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(LINE)
        axes.tick_params(labelsize=18 * 72 / DPI, labelcolor=MUTED, color=LINE, length=0, pad=6)
        axes.grid(True, axis="y", color=LINE)
        axes.locator_params(nbins=4)
        return axes


def _words(text: str) -> list[str]:
    """Split a text where a line may end: after spaces, and between characters of scripts without spaces."""
    words, word = [], ""
    for character in text:
        wide = unicodedata.east_asian_width(character) in "WF"
        if wide and word:
            words.append(word)
            word = ""
        word += character
        if wide or character.isspace():
            words.append(word)
            word = ""
    # A word that is longer than a line is broken anywhere.
    return [part[i : i + 24] for part in [*words, word] for i in range(0, len(part), 24)]


# --- one run -----------------------------------------------------------------------------------------


def _draw_run(card: _Card, run: RunData) -> None:
    sample = _sample(run)
    headline = result.headline(run)
    inner = WIDTH - 2 * MARGIN
    title = _drawable_or(result.title([run]), "A fine-tuned model")
    card.text(MARGIN, 44, card.fitted(title, 32, inner - 130, "bold"), 32, weight="bold")
    card.text(WIDTH - MARGIN - card.width("nalora", 22), 50, "nalora", 22, color=MUTED)
    details = " · ".join(
        f"{value} ({note})" if name == "Method" and note else value
        for name, value, note in result.facts(run)
        if name != "Base model"
    )
    card.text(MARGIN, 90, card.fitted(details, 22, inner), 22, color=MUTED)
    top = 156 if sample else 230
    card.text(MARGIN, top, headline.name, 22, color=MUTED)
    x, size = float(MARGIN), 76
    if headline.before:
        x = card.text(x, top + 40, headline.before, size, color=MUTED) + 20
        x = card.text(x, top + 40, "→", size, color="#8a94a3") + 20
    card.text(x, top + 40, headline.after, size, weight="bold", color=ACCENT)
    card.paragraph(MARGIN, top + 136, headline.words.rstrip("."), 21, 540, 2, color=MUTED)
    _plot_curves(card.axes(700, 152, WIDTH - MARGIN - 700, 168 if sample else 350), [run])
    if sample:
        _draw_sample(card, sample)


def _draw_sample(card: _Card, sample: dict[str, Any]) -> None:
    top, gap = 376, 24
    columns = [("Question", sample["prompt"], TEXT)]
    if sample["before"] is not None:
        columns.append(("Before", sample["before"], MUTED))
    columns.append(("After", sample["after"], TEXT))
    card.box(MARGIN - 24, top, WIDTH - 2 * MARGIN + 48, 222, TINT)
    width = (WIDTH - 2 * MARGIN - gap * (len(columns) - 1)) / len(columns)
    for i, (name, text, color) in enumerate(columns):
        x = MARGIN + i * (width + gap)
        right = name == "After" and same_text(text, sample["expected"])
        title = f"{name} ✓ as expected" if right else name
        card.text(x, top + 16, title, 20, weight="bold", color=ACCENT if name == "After" else MUTED)
        height, lines = 0, 5
        if name == "Question" and sample.get("images"):
            card.image(x, top + 50, THUMBNAIL, sample["images"][0])
            height, lines = THUMBNAIL + 8, 3
        card.paragraph(x, top + 52 + height, text.strip() or "(empty)", 20, width, lines, color=color)


def _sample(run: RunData) -> dict[str, Any] | None:
    """Return the sample that shows best what changed: as expected after and not before, short, and drawable."""

    def rank(sample: dict[str, Any]) -> tuple[float, bool, int]:
        after, expected = sample["after"], sample["expected"] or ""
        length = len(sample["prompt"]) + len(after)
        return (-similarity(after, expected), same_text(sample["before"] or "", expected), length)

    fitting = [
        sample
        for sample in run.samples
        if all(is_drawable(sample[part] or "") for part in ("prompt", "before", "after"))
    ]
    return min(fitting, key=rank, default=None)


def _plot_curves(axes: "Axes", runs: list[RunData]) -> None:
    key, corner = ("accuracy", "lower right") if all(run.prefers for run in runs) else ("loss", "upper right")
    for i, run in enumerate(runs):
        steps, values = run.train["step"], run.train[key]
        if len(values) >= SMOOTHING_MIN_REPORTS:
            values = running_mean(values, smoothing_window(len(values)))
        color = RUN_COLORS_LIGHT[i]
        if len(runs) == 1:
            axes.plot(*downsample(steps, values), color="#9db8d4", linewidth=2, label="training")
        elif not len(run.valid["step"]):
            axes.plot(*downsample(steps, values), color=color, linestyle=MATPLOTLIB_DASHES[i], linewidth=2)
        few = len(run.valid["step"]) <= FEW_VALIDATIONS
        axes.plot(
            run.valid["step"],
            run.valid[key],
            color=color,
            marker="o",
            markersize=8 if few else 5,
            linewidth=0 if few and len(runs) == 1 else 3,
            linestyle=MATPLOTLIB_DASHES[i],
            label="validation",
            clip_on=False,
        )
    highest = max(np.nanmax(each["loss"], initial=0) for run in runs for each in (run.train, run.valid))
    if key == "accuracy":
        axes.set_ylim(0, 1.08)
        axes.yaxis.set_major_formatter("{x:.0%}")
    elif needs_log_scale(runs):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.tick_params(which="minor", length=0)
    else:
        axes.set_ylim(0, 1.08 * highest or None)
    axes.set_xlabel("iteration", fontsize=17 * 72 / DPI, color=MUTED)
    axes.margins(x=0.02)
    if len(runs) == 1 and len(runs[0].train["step"]):
        axes.legend(frameon=False, fontsize=17 * 72 / DPI, labelcolor=MUTED, handlelength=1.4, loc=corner)


# --- several runs ------------------------------------------------------------------------------------


def _draw_comparison(card: _Card, runs: list[RunData]) -> None:
    inner = WIDTH - 2 * MARGIN
    heading, note = result.comparison(runs)
    label = _drawable_or(result.subtitle(runs), result.title(runs))
    card.text(MARGIN, 44, card.fitted(label, 22, inner), 22, color=MUTED)
    heading = card.fitted(_drawable_or(heading, "Runs compared"), 48, inner, "bold")
    card.text(MARGIN, 84, heading, 48, weight="bold", color=ACCENT)
    card.text(MARGIN, 154, card.fitted(note, 22, inner), 22, color=MUTED)
    best = result.best_runs(runs)
    step = min(72, 360 / len(runs))
    for i, run in enumerate(runs):
        top = 232 + i * step
        weight = "bold" if i in best else "normal"
        card.box(MARGIN, top + 4, 22, 22, RUN_COLORS_LIGHT[i])
        name = card.fitted(_drawable_or(run.name, f"run {i + 1}"), 24, 230, weight)
        card.text(MARGIN + 38, top, name, 24, weight=weight)
        card.text(MARGIN + 290, top, result.headline(run).text, 24, weight=weight)
        notes = [value for name, value, _ in result.facts(run) if name in ("Method", "Time")]
        card.text(MARGIN + 38, top + 32, " · ".join(notes), 18, color=MUTED)
    _plot_curves(card.axes(640, 226, WIDTH - MARGIN - 640, 330), runs)


# --- fonts -------------------------------------------------------------------------------------------


@cache
def installed_fonts() -> list[str]:
    """Return the fonts that the system has, the one that comes with matplotlib first."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [font for font in FONTS if font in installed]


@cache
def _characters() -> frozenset[int]:
    """Return the characters that the installed fonts have."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=name))) for name in installed_fonts()]
    return frozenset(code for font in fonts for code in font.get_charmap())


def is_drawable(text: str) -> bool:
    """Return whether a text can be drawn: the fonts have its characters, and it needs no shaping.

    Arabic, Hebrew and the scripts of India would appear in the wrong order or with parts in the wrong place.
    """
    return all(
        character.isspace()
        or (
            ord(character) in _characters()
            and unicodedata.bidirectional(character) not in ("R", "AL", "AN")
            and unicodedata.category(character) not in ("Mn", "Mc", "Me", "Cc", "Cf")
        )
        for character in unicodedata.normalize("NFC", text)
    )


def _drawable_or(text: str, other: str) -> str:
    text = text.expandtabs(4)
    return text if is_drawable(text) else other
