"""Sets of settings to start from, by name: `--preset`."""

from typing import Any

# Name -> settings of RunConfig. docs/study.md says how they were measured.
PRESETS: dict[str, dict[str, Any]] = {
    # The first reading of NA-LoRA's abstract.
    "paper": {
        "na_parameters": {
            "mask": "soft",
            "step_scaling": True,
            "gamma": [0.5, 1.0, 1.0],
            "preserve": "rms",
            "selection_limit": 0.0,
        }
    },
}
