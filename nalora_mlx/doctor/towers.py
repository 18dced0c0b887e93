"""Checks of a vision-language model's towers: what NA-LoRA and plain LoRA adapt in each, and which flags add them."""

from dataclasses import replace
from typing import TYPE_CHECKING

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import counted

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.doctor.page import Page


def check_towers(page: "Page", model: "nn.Module", config: RunConfig) -> None:
    """Report the towers of a model of mlx-vlm that has no adapters yet."""
    from nalora_mlx.adapters.targets import select_targets, vision_layers

    given = config.lora_config()
    language = replace(given, keys=None, vision=False, projector=False)
    modules = select_targets(model, language).modules.keys()
    with_projector = select_targets(model, replace(language, projector=True)).modules.keys()
    with_vision = select_targets(model, replace(language, vision=True)).modules.keys()
    gated = _gated_paths(model)
    in_language = sum(path.startswith("language_model.") for path in gated)
    page.note(f"language model: {_mlps(len(model.layers), in_language)}")

    projector, tower = len(with_projector - modules), len(with_vision - with_projector)
    if layers := vision_layers(model):
        what = f"vision tower: {_mlps(len(layers), len(gated) - in_language)}"
        page.note(
            f"{what}, {'adapted' if given.vision else f'frozen; --vision adapts {tower} modules of it'}"
        )
    if projector:
        what = f"projector: {counted(projector, 'linear layer')} (plain LoRA)"
        adapted = given.vision or given.projector
        page.note(f"{what}, {'adapted' if adapted else 'frozen; --projector or --vision adapts it'}")


def _gated_paths(model: "nn.Module") -> list[str]:
    """Return the paths of the gated MLPs that NA-LoRA can act on."""
    from nalora_mlx.adapters import layouts

    found = []
    for match in layouts.find_gated_mlps(model):
        try:
            layouts.identify(match)
        except ValueError:
            continue
        found.append(match.path)
    return found


def _mlps(layers: int, gated: int) -> str:
    kinds = []
    if gated:
        kinds.append(f"{counted(gated, 'gated MLP')} (NA-LoRA)")
    if layers > gated:
        kinds.append(f"{counted(layers - gated, 'plain MLP')} (plain LoRA)")
    return f"{counted(layers, 'layer')}, {', '.join(kinds)}"
