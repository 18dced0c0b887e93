"""Checks of the model: whether it loads, how fast it is here, and what would be adapted."""

from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nalora_mlx.core.config import METHOD_LABELS, RunConfig
from nalora_mlx.core.errors import counted

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.data.checks import RunData
    from nalora_mlx.doctor.page import Page
    from nalora_mlx.models.vision.processor import VisionProcessor


@dataclass
class LoadedModel:
    """A model whose weights may still be on disk, adapted as a run would adapt it.

    Attributes:
        model: the model.
        tokenizer: in mlx-lm's wrapper.
        config: content of config.json.
        slow: why it is slow on this machine; None if it is not.
        processor: of a vision-language model; None for a model that is trained on text alone.
    """

    model: "nn.Module"
    tokenizer: Any
    config: dict[str, Any]
    slow: str | None
    processor: "VisionProcessor | None" = None


def check_model(
    page: "Page", name: str, trust_remote_code: bool, config: RunConfig, rows: "RunData | None"
) -> LoadedModel:
    """Load and adapt a model, and report what is adapted.

    Args:
        page: to print on.
        name: of the model.
        trust_remote_code: run code that comes with the model.
        config: settings of the run.
        rows: of the run; None without data.

    Raises:
        InputError: the model cannot be loaded or adapted.
    """
    from nalora_mlx.core.trees import nbytes
    from nalora_mlx.models.loading import load_model, slow_on_cpu_notice

    run = copy(config)
    run.model, run.trust_remote_code = name, trust_remote_code
    with page.working(f"loading {name}"):
        slow = slow_on_cpu_notice(name, config.quantize)
        if slow is not None:
            page.warning(slow)
        processor = _find_processor(page, run, rows)
        if processor is not None:
            from nalora_mlx.models.vision.loading import open_vision_model

            model, model_config = open_vision_model(name, trust_remote_code, config.quantize, lazy=True)
            tokenizer = processor.tokenizer
        else:
            model, tokenizer, model_config = load_model(
                name, trust_remote_code, config.quantize, page.warning, lazy=True
            )
    size = nbytes(model.parameters()) / 1e9
    total, adapted = len(model.layers), config.num_layers  # more than there are, or not above 0, means all
    which = f", the last {adapted} adapted" if 0 < adapted < total else ""
    page.ok(f"{name}: {counted(total, 'layer')}{which}, {size:.2f} GB of weights")
    if processor is not None:
        from nalora_mlx.doctor.towers import check_towers

        check_towers(page, model, config)
    with page.working("attaching adapters"):
        _check_adapters(page, model, config)
    return LoadedModel(model, tokenizer, model_config, slow, processor)


def _find_processor(page: "Page", run: RunConfig, rows: "RunData | None") -> "VisionProcessor | None":
    """Return the processor of a model that the run trains through mlx-vlm; None for one that mlx-lm loads.

    Without data, a model that sees is loaded through mlx-vlm if that is possible.

    Raises:
        InputError: mlx-vlm is needed and not installed, or the processor cannot be loaded.
    """
    from nalora_mlx.core.optional_dependencies import install_command, is_installed
    from nalora_mlx.core.storage import read_json
    from nalora_mlx.core.versions import library_versions
    from nalora_mlx.models.loading import check_files
    from nalora_mlx.models.model_class import reads_text
    from nalora_mlx.models.vision.loading import open_processor, sees_images
    from nalora_mlx.training.images import run_processor

    config = read_json(check_files(run.model) / "config.json")
    if not sees_images(config):
        return None  # rows with images are reported with the data
    lora = run.lora_config()
    if rows is not None or lora.vision or lora.projector or not reads_text(config):
        from nalora_mlx.data.checks import RunData

        processor = run_processor(run, RunData(run.mask_prompt) if rows is None else rows, lambda _: None)
    elif is_installed("mlx-vlm"):
        processor = open_processor(run.model, config, run.trust_remote_code)
    else:
        page.note(f"it reads images too, for which mlx-vlm is needed: {install_command('vlm')}")
        return None
    if processor is None:
        page.note("it reads images too, but no row has any: mlx-lm loads the language model alone")
    else:
        version = library_versions("mlx-vlm")["mlx-vlm"]
        page.ok(f"it reads images, with {type(processor.processor).__name__} of mlx-vlm {version}")
    return processor


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
    """Return the keys that name adapted modules outside gated MLPs, each parent once: self_attn.q_proj, .v_proj.

    Whole paths that differ in the layer number are one.
    """
    from nalora_mlx.adapters.descriptions import group_layers

    keys = [
        key
        for key in result.config.keys or ()
        if any(path == key or path.endswith(f".{key}") for path in result.plain)
    ]
    shown, before = [], ""
    for key, _ in sorted(group_layers((key, "") for key in keys)):
        parent = key.rpartition(".")[0]
        shown.append(key.removeprefix(parent) if parent and parent == before else key)
        before = parent
    return ", ".join(shown)
