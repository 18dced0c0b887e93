"""Lines and grids with fewer points, so that the page of a long run stays responsive."""

import numpy as np

MAX_POINTS = 1000  # of a line
MAX_COLUMNS = 200  # of a heat map


def downsample(
    steps: np.ndarray, values: np.ndarray, max_points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """Keep the lowest and the highest point of each of max_points/2 equal segments, so that no spike is lost.

    A segment with a gap (NaN) also keeps one point of the gap, so the result can be slightly longer.

    Args:
        steps: [N], increasing.
        values: [N].
        max_points: shorter lines are returned unchanged.
    """
    if len(steps) <= max_points:
        return steps, values
    keep: list[int] = [0, len(steps) - 1]
    for segment in np.array_split(np.arange(len(steps)), max_points // 2):
        part = values[segment]
        gaps = np.isnan(part)
        if gaps.any():
            keep.append(int(segment[gaps.argmax()]))
        if not gaps.all():
            keep += [int(segment[np.nanargmin(part)]), int(segment[np.nanargmax(part)])]
    kept = np.unique(keep)
    return steps[kept], values[kept]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the last `window` values at each position, ignoring NaN; [N]."""
    known = ~np.isnan(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0))])
    count = np.concatenate([[0], np.cumsum(known)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    number = count[end] - count[start]
    return np.where(number > 0, (total[end] - total[start]) / np.maximum(number, 1), np.nan)


def average_columns(
    steps: np.ndarray, grid: np.ndarray, max_columns: int = MAX_COLUMNS
) -> tuple[np.ndarray, np.ndarray]:
    """Average the columns of a grid over at most `max_columns` equal segments, each placed at its last step.

    Args:
        steps: [T].
        grid: [L, T]; NaN where nothing was measured.
        max_columns: narrower grids are returned unchanged.
    """
    if len(steps) <= max_columns:
        return steps, grid
    segments = np.array_split(np.arange(len(steps)), max_columns)
    known = ~np.isnan(grid)
    filled = np.where(known, grid, 0)
    starts = [int(segment[0]) for segment in segments]
    count = np.add.reduceat(known, starts, axis=1)
    total = np.add.reduceat(filled, starts, axis=1)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return steps[[int(segment[-1]) for segment in segments]], means
