"""Tiny random vision-language models of mlx-vlm, saved as model directories, with the real processors."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = 320
PAD, END, START = "<pad>", "<eos>", "<bos>"
IMAGE = 8  # id of the token that image features replace; the family's other special tokens follow
SIDE = 16  # of square images, in pixels


@dataclass(frozen=True)
class Family:
    """A kind of vision-language models.

    Attributes:
        config: content of config.json, without what all families share.
        image: the token that image features replace.
        tokens: the other special tokens.
        template: chat template; None if there is none.
        processor: content of processor_config.json.
        preprocessor: content of preprocessor_config.json.
        named: special tokens that are attributes of the tokenizer.
        adds_start: whether the tokenizer begins texts with START by itself.
        images: how many images a row may have.
        tiles: whether large images are split.
    """

    config: dict[str, Any]
    image: str
    tokens: tuple[str, ...] = ()
    template: str | None = None
    processor: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    adds_start: bool = False
    images: int = 2


# --- chat templates -----------------------------------------------------------------------------------------


def chat_template(
    turn: str,
    image: str,
    prompt: str,
    start: str = "",
    assistant: str = "assistant",
    lists_only: bool = False,
) -> str:
    """Return a chat template.

    Args:
        turn: a message, with {role} and {content}.
        image: what it writes for an image.
        prompt: what generation starts with.
        start: the beginning of a chat.
        assistant: the role's name.
        lists_only: whether a content that is a string is left out.
    """
    text = "" if lists_only else "{{ m['content'] }}"
    content = (
        f"{{% if m['content'] is string %}}{text}{{% else %}}{{% for p in m['content'] %}}"
        f"{{% if p['type'] == 'image' %}}{image}{{% else %}}{{{{ p['text'] }}}}{{% endif %}}"
        "{% endfor %}{% endif %}"
    )
    role = f"{{{{ '{assistant}' if m['role'] == 'assistant' else m['role'] }}}}"
    body = turn.replace("{role}", role).replace("{content}", content)
    return (
        f"{start}{{% for m in messages %}}{body}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


def chatml(image: str, start: str = "") -> str:
    return chat_template(
        "<|im_start|>{role}\n{content}<|im_end|>\n", image, "<|im_start|>assistant\n", start=start
    )


MISTRAL = (
    START + "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}" + END + "{% else %}"
    "[INST]{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}[IMG]{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}[/INST]"
    "{% endif %}{% endfor %}"
)
LLAVA = (  # contents are lists; images come first
    "{% for m in messages %}{{ 'ASSISTANT' if m['role'] == 'assistant' else 'USER' }}: "
    "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    "{{ '" + END + "' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

# --- configs ------------------------------------------------------------------------------------------------

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "patch_size": 4,
    "image_size": SIDE,
    "num_channels": 3,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
QWEN_IDS = {
    "image_token_id": IMAGE,
    "vision_start_token_id": IMAGE + 3,
    "vision_end_token_id": IMAGE + 4,
    "video_token_id": IMAGE + 5,
}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_PIXELS = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 64,
    "max_pixels": 1024,
}
GEMMA_TURN = "<start_of_turn>{role}\n{content}<end_of_turn>\n"
SPLIT = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": SIDE}, "do_image_splitting": True}
WHOLE = {
    "size": {"longest_edge": SIDE},
    "max_image_size": {"longest_edge": SIDE},
    "do_image_splitting": False,
}
IDEFICS_TOKENS = (
    *("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"),
    *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)),
)
IDEFICS_TEMPLATE = chat_template(
    "{role}:{content}<end_of_utterance>\n", "<image>", "Assistant:", "<|im_start|>", "Assistant"
)
SQUARE = {"height": SIDE, "width": SIDE}
PALIGEMMA_VISION = VISION | {"model_type": "siglip_vision_model", "projection_dim": 32}


def paligemma(kind: str, **text: Any) -> Family:
    return Family(
        {
            "model_type": "paligemma",
            "image_token_index": IMAGE,
            "hidden_size": 32,
            "pad_token_id": 0,
            "text_config": TEXT | {"model_type": kind, **text},
            "vision_config": PALIGEMMA_VISION,
        },
        "<image>",
        processor={"processor_class": "PaliGemmaProcessor"},
        preprocessor={"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "image_seq_length": 16},
        adds_start=True,
        images=1,
    )


FAMILIES = {
    "qwen2_5_vl": Family(
        TEXT
        | QWEN_IDS
        | {
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "vision_config": QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
        },
        "<|image_pad|>",
        QWEN_TOKENS,
        chatml(QWEN_IMAGE),
        preprocessor=QWEN_PIXELS,
    ),
    "qwen3_vl": Family(
        QWEN_IDS
        | {
            "text_config": TEXT
            | {
                "model_type": "qwen3_vl_text",
                "head_dim": 8,
                "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
            },
            "vision_config": QWEN_VISION
            | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        },
        "<|image_pad|>",
        QWEN_TOKENS,
        chatml(QWEN_IMAGE),
        preprocessor=QWEN_PIXELS,
    ),
    "qwen3_5": Family(
        QWEN_IDS
        | {
            "text_config": TEXT
            | {
                "model_type": "qwen3_5_text",
                "head_dim": 16,
                "full_attention_interval": 2,
                "linear_num_value_heads": 4,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_conv_kernel_dim": 4,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [2, 1, 1],
                    "rope_theta": 10000,
                    "partial_rotary_factor": 0.5,
                },
            },
            "vision_config": QWEN_VISION | {"model_type": "qwen3_5", "num_position_embeddings": 16},
        },
        "<|image_pad|>",
        QWEN_TOKENS,
        chatml(QWEN_IMAGE),
        processor={"processor_class": "Qwen3VLProcessor"},
        preprocessor=QWEN_PIXELS
        | {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": 64, "longest_edge": 1024},
        },
    ),
    "gemma3": Family(
        {
            "image_token_index": IMAGE,
            "hidden_size": 32,
            "pad_token_id": 0,
            "text_config": TEXT
            | {
                "model_type": "gemma3_text",
                "head_dim": 8,
                "query_pre_attn_scalar": 8,
                "sliding_window": 12,
                "sliding_window_pattern": 2,
                "mm_tokens_per_image": 4,
            },
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
        },
        "<image_soft_token>",
        ("<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"),
        chat_template(GEMMA_TURN, "<start_of_image>", "<start_of_turn>model\n", START, "model"),
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        {"image_processor_type": "Gemma3ImageProcessor", "size": SQUARE},
        {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        adds_start=True,
    ),
    "gemma4": Family(
        {
            "image_token_id": IMAGE,
            "text_config": TEXT
            | {
                "model_type": "gemma4_text",
                "num_hidden_layers": 4,
                "head_dim": 8,
                "global_head_dim": 16,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "num_kv_shared_layers": 2,
                "sliding_window": 12,
                "sliding_window_pattern": 2,
                "use_bidirectional_attention": "vision",
            },
            "vision_config": VISION
            | {
                "model_type": "gemma4_vision",
                "num_key_value_heads": 4,
                "head_dim": 8,
                "global_head_dim": 8,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
                "default_output_length": 6,
            },
            "audio_config": None,
        },
        "<|image|>",
        ("<boi>", "<eoi>", "<|turn>", "<turn|>", "<|audio|>", "<boa>", "<eoa>", "<|video|>"),
        chat_template("<|turn>{role}\n{content}<turn|>\n", "<|image|>", "<|turn>model\n", START, "model"),
        {
            "processor_class": "Gemma4Processor",
            "image_processor": {"patch_size": 4, "max_soft_tokens": 6, "pooling_kernel_size": 2},
        },
        named={"image_token": "<|image|>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        adds_start=True,
    ),
    "smolvlm": Family(
        {
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "smolvlm_vision"},
        },
        "<image>",
        IDEFICS_TOKENS,
        IDEFICS_TEMPLATE,
        {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        {"image_processor_type": "SmolVLMImageProcessor", **WHOLE},
    ),
    "idefics3": Family(
        {
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "idefics3_vision"},
        },
        "<image>",
        IDEFICS_TOKENS,
        IDEFICS_TEMPLATE,
        {"processor_class": "Idefics3Processor", "image_seq_len": 4},
        {"image_processor_type": "Idefics3ImageProcessor", **SPLIT},
    ),
    "llava": Family(
        {
            "image_token_index": IMAGE,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
        },
        "<image>",
        (),
        LLAVA,
        {
            "processor_class": "LlavaProcessor",
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "crop_size": SQUARE},
        adds_start=True,
    ),
    "pixtral": Family(
        {
            "image_token_index": IMAGE,
            "text_config": TEXT | {"model_type": "mistral", "head_dim": 8},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8, "image_size": 32},
        },
        "[IMG]",
        ("[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
        MISTRAL,
        {"processor_class": "PixtralProcessor", "patch_size": 4},
        {"image_processor_type": "PixtralImageProcessor", "patch_size": 4, "size": {"longest_edge": 32}},
        adds_start=True,
    ),
    "mistral3": Family(
        {
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "text_config": TEXT | {"model_type": "mistral", "head_dim": 8},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8, "image_size": 32},
        },
        "[IMG]",
        ("[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
        MISTRAL,
        {"processor_class": "PixtralProcessor", "patch_size": 4, "spatial_merge_size": 2},
        {"image_processor_type": "PixtralImageProcessor", "patch_size": 4, "size": {"longest_edge": 32}},
        adds_start=True,
    ),
    "internvl_chat": Family(
        {
            "image_token_index": IMAGE,
            "video_token_index": IMAGE,
            "downsample_ratio": 0.5,
            "max_dynamic_patch": 4,
            "llm_config": TEXT | {"model_type": "qwen2", "head_dim": 8},
            "vision_config": VISION | {"model_type": "intern_vit_6b"},
        },
        "<IMG_CONTEXT>",
        ("<|im_start|>", "<|im_end|>", "<img>", "</img>"),
        chatml("<image>\n"),
    ),
    "internvl": Family(
        {
            "image_token_id": IMAGE,
            "downsample_ratio": 0.5,
            "max_dynamic_patch": 2,
            "text_config": TEXT | {"model_type": "qwen3", "head_dim": 8},
            "vision_config": VISION
            | {"model_type": "internvl_vision", "image_size": [SIDE, SIDE], "patch_size": [4, 4]},
        },
        "<IMG_CONTEXT>",
        ("<|im_start|>", "<|im_end|>", "<img>", "</img>"),
        chatml("<IMG_CONTEXT>\n"),
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
    ),
    "lfm2_vl": Family(
        {
            "image_token_id": IMAGE,
            "downsample_factor": 2,
            "projector_hidden_size": 32,
            "text_config": TEXT
            | {
                "model_type": "lfm2",
                "layer_types": ["conv", "full_attention"],
                "block_auto_adjust_ff_dim": False,
                "block_dim": 32,
                "conv_dim": 32,
                "conv_dim_out": 32,
                "num_heads": 4,
                "conv_L_cache": 3,
                "norm_eps": 1e-5,
            },
            "vision_config": VISION | {"model_type": "siglip2_vision_model", "num_patches": 16},
        },
        "<image>",
        (
            *("<|im_start|>", "<|im_end|>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
            *(f"<|img_row_{i}_col_{j}|>" for i in (1, 2) for j in (1, 2)),
        ),
        chatml("<image>", START),
        {"processor_class": "Lfm2VlProcessor"},
        {
            "image_processor_type": "Lfm2VlImageProcessor",
            "encoder_patch_size": 4,
            "downsample_factor": 2,
            "min_image_tokens": 2,
            "max_image_tokens": 6,
            "tile_size": SIDE,
            "max_tiles": 4,
        },
        {
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail": "<|img_thumbnail|>",
        },
        adds_start=True,
    ),
    "paligemma": paligemma("gemma"),
    "paligemma2": paligemma(
        "gemma2",
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
}

# --- files --------------------------------------------------------------------------------------------------


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and the family's special tokens."""
    special = [PAD, END, START, *(f"<unused{i}>" for i in range(IMAGE - 3)), family.image, *family.tokens]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special += [f"<unused{i}>" for i in range(len(special), VOCABULARY - len(letters))]
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    assert len(vocabulary) == VOCABULARY
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if family.adds_start:
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{START} $A", f"{START} $A $B", [(START, special.index(START))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        bos_token=START,
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=family.named,
    )


def save_model(name: str, directory: Path) -> Path:
    """Save a tiny random model of a family as a model directory."""
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    family = FAMILIES[name]
    config = {"model_type": name, **family.config, "eos_token_id": 1, "bos_token_id": 2}
    directory.mkdir(parents=True, exist_ok=True)
    for file, content in {
        "config.json": config,
        "processor_config.json": family.processor,
        "preprocessor_config.json": family.preprocessor,
    }.items():
        if content:
            (directory / file).write_text(json.dumps(content))
    build_tokenizer(family).save_pretrained(directory)
    config = json.loads(json.dumps(config))
    arch, _ = get_model_and_args(config)
    config.setdefault("text_config", config.pop("llm_config", {}))
    settings = update_module_configs(
        arch.ModelConfig.from_dict(config),
        arch,
        config,
        ["text", "vision", "perceiver", "projector", "audio"],
    )
    mx.random.seed(0)
    model = arch.Model(settings)
    mx.save_safetensors(str(directory / "model.safetensors"), random_weights(model), {"format": "mlx"})
    return directory


def random_weights(model: Any) -> dict[str, mx.array]:
    """Return weights with which every part of a model matters: no zeros, no ones."""
    generator = np.random.default_rng(0)

    def noisy(array: mx.array) -> mx.array:
        factor, scale = (0.3, 0.1) if array.ndim < 2 else (0.5, 0.5 * max(array.shape[-1], 8) ** -0.5)
        return array * factor + mx.array(generator.normal(0, scale, array.shape), mx.float32)

    return dict(tree_flatten(tree_map(noisy, model.parameters())))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a random picture."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
