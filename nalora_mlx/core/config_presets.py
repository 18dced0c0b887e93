"""Sets of settings to start from, by name: `--preset`."""

from typing import Any

# Without it, Adam's steps are up to 6.6 times as long at first, 2.4 times in update 200, and 1.3 times in update 1,000.
_BIAS_CORRECTION = {"adam": {"bias_correction": True}, "adamw": {"bias_correction": True}}

# Name -> settings of RunConfig. docs/study.md says how they were measured.
PRESETS: dict[str, dict[str, Any]] = {
    # The lowest loss in a short time.
    "quick": {"learning_rate": 3e-4, "optimizer_config": _BIAS_CORRECTION},
    # A low loss, and half of what quick forgets.
    "careful": {"learning_rate": 3e-5, "optimizer_config": _BIAS_CORRECTION},
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
