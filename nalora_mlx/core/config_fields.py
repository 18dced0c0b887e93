"""Building blocks of settings dataclasses: fields with help texts, and checks of values."""

from dataclasses import field, fields
from typing import Any

from nalora_mlx.core.parsing import meant_value


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a field of a settings dataclass.

    Args:
        default: the only place where the default is written.
        help: help text of the flag.
        metadata: options of the flag, see `nalora_mlx.arguments.add_settings`: choices, nargs, const, action
            and metavar as in argparse; flag_name for a flag that is not named like the setting;
            size=True for a number of bytes such as 2GB; yaml_only=True for no flag. flag=True marks a setting of
            `NALoRAConfig` that is a flag of its own, and may_change=True one that may differ when a run is resumed.
    """
    metadata["help"] = help
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def wrong_choices(settings: Any) -> list[str]:
    """Return a problem for each value that is not among its field's choices."""
    found = []
    for f in fields(settings):
        choices = f.metadata.get("choices")
        value = getattr(settings, f.name)
        for item in value if isinstance(value, tuple) else (value,):
            if choices and item is not None and item not in choices:
                meant = meant_value(f.name, item, choices)
                found.append(f"{f.name} is {item!r}; choose from {', '.join(choices)}{meant}")
    return found


def too_small(settings: Any, minimum: int, *names: str) -> list[str]:
    """Return a problem for each named value below a minimum; None passes."""
    values = {name: getattr(settings, name) for name in names}
    return [
        f"{name} is {value}; it must be at least {minimum}"
        for name, value in values.items()
        if value is not None and value < minimum
    ]


def not_a_count(settings: Any, name: str) -> list[str]:
    """Return a problem if a value is neither at least 1 nor -1, which stands for all."""
    value = getattr(settings, name)
    return [] if value >= 1 or value == -1 else [f"{name} is {value}; it must be at least 1, or -1 for all"]
