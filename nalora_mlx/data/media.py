"""What the images of a row add to its tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Features(Protocol):
    """The features of one image: arrays [n, ...] by name, for its n positions."""

    def load(self) -> dict[str, np.ndarray]:
        """Read them."""
        ...


@dataclass(frozen=True)
class RowMedia:
    """The images of a row.

    Attributes:
        positions: indices of the tokens that image features replace, int32 [n].
        features: of each image, in order; empty if the towers are trained.
        aligned: arrays [..., L] with an entry for each token of the row, such as position ids of rotary embeddings.
        inputs: what the model's processor makes of the images, if the towers are trained.
        digest: of the images' pixels.
    """

    positions: np.ndarray
    features: tuple[Features, ...] = ()
    aligned: Mapping[str, np.ndarray] | None = None
    inputs: Features | None = None
    digest: str = ""
