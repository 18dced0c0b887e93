"""Checks of the model: whether it loads, how fast it is here, and what would be adapted."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nalora_mlx.core.config import METHOD_LABELS, RunConfig
from nalora_mlx.core.errors import counted

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.doctor.page import Page


@dataclass
class LoadedModel:
    """A model whose weights may still be on disk, adapted as a run would adapt it.

    Attributes:
        model: the model.
        tokenizer: in mlx-lm's wrapper.
        config: content of config.json.
        slow: why it is slow on this machine; None if it is not.
    """

    model: "nn.Module"
    tokenizer: Any
    config: dict[str, Any]
    slow: str | None


def check_model(page: "Page", name: str, trust_remote_code: bool, config: RunConfig) -> LoadedModel:
    """Load and adapt a model, and report what is adapted.

    Raises:
        InputError: the model cannot be loaded or adapted.
    """
    from nalora_mlx.core.trees import nbytes
    from nalora_mlx.models.loading import load_model, slow_on_cpu_notice

    with page.working(f"loading {name}"):
        slow = slow_on_cpu_notice(name, config.quantize)
        if slow is not None:
            page.warning(slow)
        model, tokenizer, model_config = load_model(
            name, trust_remote_code, config.quantize, page.warning, lazy=True
        )
    size = nbytes(model.parameters()) / 1e9
    total, adapted = len(model.layers), config.num_layers  # more than there are, or not above 0, means all
    which = f", the last {adapted} adapted" if 0 < adapted < total else ""
    page.ok(f"{name}: {counted(total, 'layer')}{which}, {size:.2f} GB of weights")
    with page.working("attaching adapters"):
        _check_adapters(page, model, config)
    return LoadedModel(model, tokenizer, model_config, slow)


def _check_adapters(page: "Page", model: "nn.Module", config: RunConfig) -> None:
    """Make a model trainable as the run would, and report what trains."""
    from nalora_mlx.adapters.attach import adapt, adapt_dora, unfreeze_layers
    from nalora_mlx.adapters.descriptions import group_layers, group_reasons

    if config.fine_tune_type == "full":
        page.note(f"full fine-tuning of {counted(unfreeze_layers(model, config.num_layers), 'layer')}")
        return
    wanted = config.lora_config()
    layers = min(wanted.num_layers, len(model.layers))  # a larger number means all
    wanted, label = replace(wanted, num_layers=layers), METHOD_LABELS[config.fine_tune_type]
    result = (
        adapt_dora(model, wanted)
        if config.fine_tune_type == "dora"
        else adapt(model, wanted, verify_all=False)
    )
    for path, (layout, activation, experts) in group_layers(
        (g.path, (g.layout, g.activation, g.experts)) for g in result.gated
    ):
        of = f", {counted(experts, 'expert')}" if experts else ""
        page.ok(f"{label}: {path}, {activation} ({layout}{of})")
    for path, reason in group_layers((s.path, s.reason) for s in result.skipped):
        page.note(f"{path}: {reason}")
    for notice in result.notices:
        page.notice(notice)
    if not result.gated and not result.skipped and wanted.active:
        page.warning("no gated MLP: NA-LoRA has nothing to act on, and training would be plain LoRA")
    if result.plain:
        kind = "DoRA" if config.fine_tune_type == "dora" else "LoRA"
        other = "other module" if result.gated else "module"
        page.note(f"{kind}: {counted(len(result.plain), other)}, {_keys_of(result)}")
    if result.left_out:
        page.note(f"left out by default: {group_reasons(result.left_out)}")


def _keys_of(result: Any) -> str:
    """Return the keys that name adapted modules outside gated MLPs, each parent once: self_attn.q_proj, .v_proj."""
    keys = [
        key
        for key in result.config.keys or ()
        if any(path == key or path.endswith(f".{key}") for path in result.plain)
    ]
    shown, before = [], ""
    for key in sorted(keys):
        parent = key.rpartition(".")[0]
        shown.append(key.removeprefix(parent) if parent and parent == before else key)
        before = parent
    return ", ".join(shown)
