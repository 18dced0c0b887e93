"""Images of rows, found and checked before training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.optional_dependencies import is_installed
from nalora_mlx.data.findings import Finding, Findings
from nalora_mlx.data.image_references import locate
from nalora_mlx.data.images import check_image
from nalora_mlx.data.rows.formats import Row


def check_images(
    rows: Sequence[Row], directory: Path | None, findings: Findings
) -> tuple[list[Row], list[str]]:
    """Return the rows with absolute paths of their images, and a problem for each image that cannot be read.

    Without Pillow, no model can see, and images are not opened.

    Args:
        rows: as they were parsed. Those with a bad image are left out.
        directory: where relative paths start; None if there is no such place.
        findings: rows with animated images are added.
    """
    good, problems = [], []
    animated: dict[str, bool] = {}  # by path
    with_pillow = is_installed("pillow")

    def is_animated(image: Any, source: str) -> bool:
        if not isinstance(image, str):
            return check_image(image, source)
        if image not in animated:
            animated[image] = check_image(image, source)
        return animated[image]

    for row in rows:
        images = []
        for reference in row.images:
            try:
                image = locate(reference, directory, row.source)
                if with_pillow and is_animated(image, row.source):
                    findings.add(Finding.ANIMATED, row.source)
                images.append(image)
            except InputError as error:
                problems.append(str(error))
        if len(images) == len(row.images):
            good.append(replace(row, images=tuple(images)) if images else row)
    return good, problems
