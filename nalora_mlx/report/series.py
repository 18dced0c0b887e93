"""Series and grids with fewer points than were measured, so that a page of a long run stays quick."""

import numpy as np

MOST_POINTS = 1000  # of a line
MOST_COLUMNS = 200  # of a heat map


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Keep the lowest and the highest point of each of most/2 equal stretches: no spike is lost.

    A stretch with a gap (NaN) keeps one point of it.

    Args:
        steps: [N], increasing.
        values: [N].
        most: longer series are thinned; a little more than this stays where there are gaps.
    """
    if len(steps) <= most:
        return steps, values
    keep: list[int] = [0, len(steps) - 1]
    for stretch in np.array_split(np.arange(len(steps)), most // 2):
        part = values[stretch]
        gaps = np.isnan(part)
        if gaps.any():
            keep.append(int(stretch[gaps.argmax()]))
        if not gaps.all():
            keep += [int(stretch[np.nanargmin(part)]), int(stretch[np.nanargmax(part)])]
    kept = np.unique(keep)
    return steps[kept], values[kept]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values up to each one, NaN left out; [N]."""
    known = ~np.isnan(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0))])
    count = np.concatenate([[0], np.cumsum(known)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    number = count[end] - count[start]
    return np.where(number > 0, (total[end] - total[start]) / np.maximum(number, 1), np.nan)


def binned(steps: np.ndarray, grid: np.ndarray, most: int = MOST_COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """Average the columns of a grid in at most `most` equal stretches, each at its last step.

    Args:
        steps: [T].
        grid: [L, T]; NaN where nothing was measured.
        most: longer grids are averaged.
    """
    if len(steps) <= most:
        return steps, grid
    stretches = np.array_split(np.arange(len(steps)), most)
    known = ~np.isnan(grid)
    filled = np.where(known, grid, 0)
    starts = [int(stretch[0]) for stretch in stretches]
    count = np.add.reduceat(known, starts, axis=1)
    total = np.add.reduceat(filled, starts, axis=1)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return steps[[int(stretch[-1]) for stretch in stretches]], means
