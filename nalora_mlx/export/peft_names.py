"""Names of layers in transformers, which PEFT's files use, and in MLX; and where both have the same layers."""

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.lazy_model import LazyModel

PREFIX = "base_model.model."
HEAD = "lm_head"
# Model types whose linear and embedding layers have the same layouts in mlx-lm and transformers, and the same names but
# for _RENAMED. Tests compare the logits of each with those of transformers + PEFT: tests/interop/test_peft.py starts
# from mlx-lm's models, test_peft_models.py from those of transformers.
MODEL_TYPES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("smollm3", "olmo2", "glm4", "granite", "cohere2", "starcoder2", "ernie4_5", "helium", "nemotron"),
    *("hunyuan_v1_dense", "stablelm", "afmoe", "apertus", "cohere", "dbrx", "deepseek_v2", "deepseek_v3"),
    *("dots1", "exaone4", "exaone_moe", "falcon_h1", "gemma4_text", "glm", "glm4_moe", "glm4_moe_lite"),
    *("granitemoe", "granitemoehybrid", "internlm3", "laguna", "lfm2", "lfm2_moe", "mellum", "ministral3"),
    *("nemotron_h", "olmo3", "olmoe", "phi", "phimoe", "qwen2_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next"),
    *("seed_oss", "gemma3", "gemma4", "mistral3", "qwen3_vl"),
)
# Multimodal model types. Their text models have the layers of another model type.
_MULTIMODAL = ("gemma3", "gemma4", "mistral3", "qwen3_vl")
# Where a multimodal model has its text model: in transformers, and in mlx-lm and earlier versions of transformers.
_THEIR_TEXT_MODEL, _OUR_TEXT_MODEL = "model.language_model.", "language_model."
# Vision-language model types whose layers have the same layouts in mlx-vlm and transformers. Each has pairs of prefixes
# in mlx-vlm and in the class that AutoModelForImageTextToText chooses; the first pair that fits a path counts.
_OF_QWEN = (("vision_tower.", "model.visual."),)
_OF_IDEFICS = (("language_model.lm_head", HEAD), ("language_model.", "model.text_model."))
_OF_ALL = (
    ("language_model.lm_head", HEAD),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("", "model."),
)
VISION_LANGUAGE: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_5"), _OF_QWEN),
    **dict.fromkeys(("smolvlm", "idefics3"), _OF_IDEFICS),
    **dict.fromkeys(("gemma3", "gemma4", "internvl", "lfm2_vl", "llava", "mistral3", "paligemma"), ()),
}
# Model type -> pairs of names in mlx-lm and in transformers that differ.
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "laguna": ((".shared_expert.", ".shared_experts."),),
    "lfm2_moe": (
        (".feed_forward.gate_proj", ".feed_forward.w1"),
        (".feed_forward.up_proj", ".feed_forward.w3"),
        (".feed_forward.down_proj", ".feed_forward.w2"),
    ),
    "nemotron_h": (("backbone.", "model."),),
}
# Layers that PEFT refuses to adapt, because the kernel of a Mamba layer reads their weights directly.
_MAMBA_OUTPUTS = {"falcon_h1": ".mamba.out_proj", "nemotron_h": ".mixer.out_proj"}
# Names that PEFT takes for those of experts in any model with experts, since transformers 5 stacks these.
_EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


def check_model_type(model: LazyModel) -> None:
    """Raise InputError if a model's layers have not been compared with those of transformers."""
    model_type = model.config["model_type"]
    supported = VISION_LANGUAGE if model.images else MODEL_TYPES
    if model_type not in supported:
        raise InputError(
            f"model_type {model_type}: not supported for PEFT, because its layers have not been compared with "
            f"transformers; supported are {', '.join(sorted(supported))}"
        )


def our_path(module: str, model: LazyModel) -> str:
    """Return the path in mlx-lm of a module of transformers; the name itself if the model has no such layer."""
    if model.images:
        paths = (path.removesuffix(".weight") for path in model.weights)
        return next((path for path in paths if _in_vision_language_model(path, model) == module), module)
    path = module.removeprefix(_OUR_TEXT_MODEL)
    if path.startswith(_THEIR_TEXT_MODEL):
        path = "model." + path.removeprefix(_THEIR_TEXT_MODEL)
    for ours, theirs in _RENAMED.get(model.config["model_type"], ()):
        path = path.replace(theirs, ours)
    candidates = (module, path, _OUR_TEXT_MODEL + path)
    return next((path for path in candidates if f"{path}.weight" in model.weights), module)


def their_path(path: str, model: LazyModel) -> str:
    """Return the name of a layer of mlx-lm or mlx-vlm in the class that transformers chooses.

    Raises:
        InputError: PEFT cannot adapt the layer.
    """
    if model.images:
        return _in_vision_language_model(path, model)
    model_type = model.config["model_type"]
    if model_type in _MAMBA_OUTPUTS and path.endswith(_MAMBA_OUTPUTS[model_type]):
        raise InputError(f"{path}: PEFT adapts no outputs of Mamba layers; merge it (nalora fuse)")
    module = path.removeprefix(_OUR_TEXT_MODEL)
    for ours, theirs in _RENAMED.get(model_type, ()):
        module = module.replace(ours, theirs)
    has_experts = any(weight.kind == "experts" for weight in model.weights.values())
    if has_experts and module.rpartition(".")[2] in _EXPERT_NAMES:
        raise InputError(
            f"{path}: PEFT takes this name for experts, in a model that has them; merge it (nalora fuse), "
            "or train with --keys without it"
        )
    if model_type in _MULTIMODAL and module.startswith("model."):
        return _THEIR_TEXT_MODEL + module.removeprefix("model.")
    return module


def _in_vision_language_model(path: str, model: LazyModel) -> str:
    """Return the name of a layer of mlx-vlm in the class that transformers' AutoModelForImageTextToText chooses."""
    pairs = (*VISION_LANGUAGE[model.config["model_type"]], *_OF_ALL)
    return next(theirs + path.removeprefix(ours) for ours, theirs in pairs if path.startswith(ours))


def is_tied(model: LazyModel) -> bool:
    """Return whether a model's output head is its embedding."""
    return not any(is_head(path.removesuffix(".weight")) for path in model.weights)


def is_head(module: str) -> bool:
    """Return whether a module is an output head, by its name, which is the same in both libraries."""
    return module.rpartition(".")[2] == HEAD


def embedding_path(model: LazyModel) -> str | None:
    """Return the path of the layer that embeds tokens."""
    names = (path.removesuffix(".weight") for path in model.weights if path.endswith(_EMBEDDINGS))
    return next(names, None)
