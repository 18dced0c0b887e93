"""Numbers, sizes and durations as people read them."""

import math


def format_number(value: float | None, digits: int = 4) -> str:
    """Format a number with a few significant digits; "-" if there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def format_loss(loss: float) -> str:
    """Format a loss with as few decimals, two to four, as do not make it zero."""
    return _decimals(loss, 2 if loss >= 0.01 else 3 if loss >= 0.001 else 4)


def format_pair(before: float, after: float) -> tuple[str, str]:
    """Format two losses like `format_loss`, but with as many decimals, two to four, as show their difference."""
    decimals = max(len(format_loss(loss).partition(".")[2]) for loss in (before, after))
    difference = abs(before - after)
    if difference >= 5e-4:
        while difference < 5 * 10.0**-decimals:
            decimals += 1
    return _decimals(before, decimals), _decimals(after, decimals)


def format_share(share: float) -> str:
    """Format a share as a percentage, with one decimal if it would be 0% or 100% without and is not."""
    rounded = f"{share:.0%}"
    return f"{share:.1%}" if rounded in ("0%", "100%") and share not in (0, 1) else rounded


def _decimals(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}"


def format_count(count: float) -> str:
    """Format a number of parameters: 135M, 1.5B."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.{0 if count >= 10 * size else 1}f}{letter}"
    return f"{count:,.0f}"


def format_duration(seconds: float) -> str:
    """Format a duration: 45 s, 5 min 39 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"
