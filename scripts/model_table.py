"""Write docs/models.md: what can be done with well-known models, and the gated MLPs in every model of mlx-lm.

Usage: python scripts/model_table.py [--check]

Builds the miniature of each model in tests/miniatures and adapts it; the rest is read from the exporters' tables. With
--check, writes nothing and fails if the page is out of date.
"""

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx_lm.utils import MODEL_REMAPPING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nalora_mlx.adapters.attach import adapt  # noqa: E402
from nalora_mlx.core.config import NALoRAConfig  # noqa: E402
from nalora_mlx.core.errors import InputError  # noqa: E402
from nalora_mlx.export.gguf.architectures import ARCHITECTURES, UNSUPPORTED  # noqa: E402
from nalora_mlx.export.peft_names import MODEL_TYPES  # noqa: E402
from tests.adapters.test_miniatures import ZOO, build  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
HEAD = """# Models

Which models train, and what is special about them. `model_type` is the one in config.json. Most models that are not
in the first table train too: the [last one](#gated-mlps-in-mlx-lm-{version}) has every model of mlx-lm.

Of these models, only SmolLM2-135M was trained with real weights. The others were tested as miniatures with
random weights, whose gradients are compared with those of mlx-lm's own adapters.

- **NA-LoRA acts on:** the layers whose updates are masked. All other adapted layers get plain LoRA.
- **Experts** are adapted, their routers are not, unless `--keys` names them.
- **Thinking models** can be trained to answer without a thought: `--chat-template-args '{"enable_thinking": false}'`.
- **Remarks on chats** are about templates as the tests have them (`tests/data/templates`). A later release of a model
  may have another one. `nalora doctor --model MODEL --data DATA --mask-prompt --show-masks 1` shows how your rows are
  rendered.

| model | model_type | trains | NA-LoRA acts on | remarks |
|---|---|---|---|---|
"""
NOTES_HEAD = """
Three models of mlx-lm cannot be trained. Muse Spark and BitNet use Metal kernels that have no gradient. The parameters
of RecurrentGemma cannot be frozen. Models that see
train on [images](vision.md), or like models that hear as text models.

Recurrent and hybrid models train like others, and their rows can be packed: gated delta nets (Qwen3.5, Qwen3-Next,
OLMo Hybrid, Kimi Linear), Mamba and Mamba-2 (Jamba, Falcon H1, Granite 4, Nemotron H, PLaMo 2), lightning attention
(Bailing), RWKV-7 and short convolutions (LFM2). Training computes their recurrences in chunks of tokens instead of
token by token, see [memory.md](memory.md#recurrent-and-hybrid-models). By default, LoRA adapts their input and output
projections, but not the small projections that compute gates, decays and step sizes. `nalora doctor` lists both.

Every key of config.json is accounted for when a model is loaded. What transformers 5 writes differently
(`rope_parameters`) is translated. A setting that mlx-lm cannot apply and that would change results ends the load, and
is named, as is a value that no model can have. Unknown keys, and smaller differences such as a sliding window, are
named in a note; `nalora doctor --model MODEL` lists them.

## Exports of well-known models

A fused model runs in mlx-lm. The other formats:

- **GGUF:** the architecture in llama.cpp. If the model can also see or hear, this is its text part.
- **GGUF LoRA, PEFT:** adapters in these formats. Layers named with "not" must be merged instead.

The exporters refuse what they do not support, with the reason. The tests compare the logits of every row with those
of llama.cpp and of transformers with PEFT. `scripts/model_table.py` generates this page from the exporters' tables,
and by adapting a miniature of each model.

| model | GGUF | GGUF LoRA | PEFT |
|---|---|---|---|
"""
EXPORT_HEAD = """
## Exports of every model type

| model_type | GGUF | PEFT |
|---|---|---|
"""
GATED_HEAD = """
## Gated MLPs in mlx-lm {version}

The gated MLPs in every model of mlx-lm, and whether NA-LoRA supports them ("yes"). The tests compare each row with
mlx-lm's own adapters.

| model | gated MLPs | layout | activation | experts | NA-LoRA |
|---|---|---|---|---|---|
"""
# Layers for which llama.cpp ignores or refuses an adapter; see tests/interop/test_gguf_lora.py.
_MLA = "not attention's q and kv"
WITHOUT_LORA = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_k2", "mistral4"), _MLA
    ),
    "gemma3n": "not AltUp",
    "gemma4": "not the per-layer embedding's",
    "kimi_linear": "not attention and head",
    "nemotron_h": "not latent projections",
    "rwkv7": "not its own low-rank modules",
}
# Layers for which PEFT refuses an adapter, besides the MLPs of models with experts.
WITHOUT_PEFT = {"falcon_h1": "not Mamba's out_proj", "nemotron_h": "not Mamba's out_proj and experts"}
# Further architectures of a model type, which depend on its config.
OTHER_NAMES = {
    "bailing_moe": ("bailingmoe",),
    "granitemoehybrid": ("granite", "granitemoe"),
    "mistral3": ("mistral3", "mistral4"),
    "nemotron_h": ("nemotron_h_moe",),
    "qwen3_5": ("qwen35moe",),
    "qwen3_5_moe": ("qwen35moe",),
}
# Names that people know -> model_type. A wrapper of a text model has the type of its text model after a slash.
NAMES = {
    "Qwen3 0.6B to 32B": "qwen3",
    "Qwen3 30B-A3B, 235B-A22B; Qwen3-Coder": "qwen3_moe",
    "Qwen3.5 0.8B to 27B": "qwen3_5",
    "Qwen3.5 35B-A3B and larger": "qwen3_5_moe",
    "Qwen3-Next 80B-A3B": "qwen3_next",
    "Qwen2.5, DeepSeek-R1-Distill-Qwen": "qwen2",
    "Llama 3, 3.1, 3.2, 3.3; DeepSeek-R1-Distill-Llama": "llama",
    "Llama 4 Scout, Maverick": "llama4",
    "SmolLM2 135M, 360M, 1.7B": "llama",
    "SmolLM3": "smollm3",
    "Gemma 3 270M, 1B": "gemma3_text",
    "Gemma 3 4B to 27B": "gemma3",
    "Gemma 3n": "gemma3n",
    "Gemma 4": "gemma4",
    "Gemma 2": "gemma2",
    "Mistral 7B, Nemo, Small 3": "mistral",
    "Mistral Small 3.1, 3.2": "mistral3/mistral",
    "Mistral Small 4": "mistral3/mistral4",
    "Ministral 3": "mistral3/ministral3",
    "Mixtral": "mixtral",
    "Phi-3, Phi-4": "phi3",
    "gpt-oss 20B, 120B": "gpt_oss",
    "LFM2 350M to 2.6B": "lfm2",
    "LFM2 8B-A1B": "lfm2_moe",
    "Granite 3": "granite",
    "Granite 4": "granitemoehybrid",
    "OLMo 2": "olmo2",
    "OLMo 3": "olmo3",
    "DeepSeek V3, V3.1, R1": "deepseek_v3",
    "DeepSeek V3.2": "deepseek_v32",
    "DeepSeek V2 Lite, Coder V2 Lite": "deepseek_v2",
    "Kimi K2": "kimi_k2",
    "Kimi Linear 48B-A3B": "kimi_linear",
    "GLM-4 9B, 32B": "glm4",
    "GLM-4.5, 4.6, 4.7": "glm4_moe",
    "GLM-4.7-Flash": "glm4_moe_lite",
    "MiniMax M2": "minimax_m2",
    "Nemotron 3 Nano 30B-A3B": "nemotron_h",
    "EXAONE 4": "exaone4",
    "Hunyuan 0.5B to 7B": "hunyuan_v1_dense",
    "Hunyuan A13B": "hunyuan",
    "Seed-OSS 36B": "seed_oss",
    "ERNIE 4.5 0.3B": "ernie4_5",
    "ERNIE 4.5 21B-A3B": "ernie4_5_moe",
    "Command R7B, Command A": "cohere2",
    "Command R, R+": "cohere",
    "Ling, Ring (Lite)": "bailing_moe",
    "Falcon-H1": "falcon_h1",
    "Apertus": "apertus",
    "Jamba": "jamba",
    "Mamba 2": "mamba2",
    "RWKV-7": "rwkv7",
    "StarCoder2": "starcoder2",
    "InternLM3": "internlm3",
}
# What is special about a model type, or one model, when it is trained. The tests of chats, packing and recurrences
# support it.
_THOUGHTS = "earlier thoughts are dropped, so a chat with thoughts becomes several sequences"
_HYBRID = "hybrid: recurrent layers train in chunks of tokens"
_TURNS = "user and assistant must take turns; no tools"
REMARKS = {
    "qwen3": _THOUGHTS,
    "qwen3_5": f"{_HYBRID}; the prompt opens a thought",
    "qwen3_5_moe": f"{_HYBRID}; the prompt opens a thought",
    "qwen3_next": _HYBRID,
    "Llama 3, 3.1, 3.2, 3.3; DeepSeek-R1-Distill-Llama": "3.2: a date in the system prompt, one tool call per message",
    "SmolLM2 135M, 360M, 1.7B": "the model of our study and demo; no tools in its chats",
    "gemma2": f"no system message; {_TURNS}",
    "gemma3": f"a system message becomes part of the first question; {_TURNS}",
    "gemma3_text": f"a system message becomes part of the first question; {_TURNS}",
    "gemma4": "thoughts stay only after the last question",
    "Mistral 7B, Nemo, Small 3": "old releases take no tools; the system message stands before the last question",
    "phi3": "joint projections: the keys are `self_attn.qkv_proj` and `mlp.gate_up_proj`",
    "gpt_oss": "earlier analysis is dropped; one tool call per message; its MXFP4 experts are exported unchanged",
    "lfm2": "short convolutions; earlier thoughts are dropped",
    "lfm2_moe": "short convolutions",
    "granitemoehybrid": _HYBRID,
    "deepseek_v3": "R1's prompt opens a thought",
    "kimi_linear": _HYBRID,
    "nemotron_h": f"{_HYBRID}; its MLPs have no gate",
    "falcon_h1": _HYBRID,
    "jamba": _HYBRID,
    "apertus": "its MLPs have no gate",
    "mamba2": "recurrent: trains in chunks of tokens; no MLPs",
    "rwkv7": "recurrent: trains in chunks of tokens; its MLPs have no gate",
    "starcoder2": "its MLPs have no gate",
}


def known_rows() -> Iterator[tuple[str, ...]]:
    """Yield whether well-known models train, and what is special about them."""
    for name, types in NAMES.items():
        model_type = types.rpartition("/")[2]
        miniature = ZOO[MODEL_REMAPPING.get(model_type, model_type)]
        obstacle = miniature.no_forward or miniature.no_backward or miniature.no_freeze
        yield (
            name,
            types.partition("/")[0],
            f"no: {obstacle}" if obstacle else "yes",
            acts_on(model_type),
            REMARKS.get(name, REMARKS.get(model_type, "")),
        )


def known_export_rows() -> Iterator[tuple[str, ...]]:
    """Yield the formats that well-known models can be exported to."""
    for name, types in NAMES.items():
        model_type = types.rpartition("/")[2]
        arch = ARCHITECTURES.get(model_type)
        miniature = ZOO[MODEL_REMAPPING.get(model_type, model_type)]
        experts = any(kind.experts for kind in miniature.gated)
        yield (
            name,
            arch.other_name(miniature.config) or arch.name if arch else f"no: {UNSUPPORTED[model_type]}",
            WITHOUT_LORA.get(model_type, "yes") if arch else "no",
            WITHOUT_PEFT.get(model_type, "not MLPs and experts" if experts else "yes")
            if model_type in MODEL_TYPES
            else "no",
        )


def export_rows() -> Iterator[tuple[str, ...]]:
    """Yield what can be exported of every model type. Some types have several architectures, chosen by the config."""
    for model_type in sorted(ARCHITECTURES | UNSUPPORTED | dict.fromkeys(MODEL_TYPES), key=str.lower):
        arch = ARCHITECTURES.get(model_type)
        names = dict.fromkeys((arch.name, *OTHER_NAMES.get(model_type, ()))) if arch else ()
        gguf = ", ".join(names) if arch else f"no: {UNSUPPORTED[model_type]}"
        yield model_type, gguf, "yes" if model_type in MODEL_TYPES else "no"


def acts_on(model_type: str) -> str:
    """Return in words which MLPs NA-LoRA acts on."""
    table = [row for row in rows(MODEL_REMAPPING.get(model_type, model_type)) if row[5] == "yes"]
    kinds = dict.fromkeys("experts" if row[4] else "MLPs" for row in sorted(table, key=lambda row: row[4]))
    return " and ".join(kinds) or "none: plain LoRA"


def rows(name: str) -> list[tuple[str, ...]]:
    """Return the table rows of a model: name, path, layout, activation, number of experts, NA-LoRA.

    Layers that differ only in their indices share a row, with * in the path.
    """
    kinds = ZOO[name].gated
    if not kinds:
        return [(name, "none", "", "", "", "plain LoRA: no gated MLPs")]
    broken = ZOO[name].no_forward or ZOO[name].no_freeze
    if broken:
        return [
            (name, kind.paths, kind.gate, kind.activation, str(kind.experts or ""), broken) for kind in kinds
        ]
    try:
        report = adapt(build(name), NALoRAConfig(num_layers=-1, rank=2))
    except InputError as error:
        return [(name, "", "", "", "", str(error))]
    cells = [
        (without_indices(g.path), g.layout, g.activation, str(g.experts or ""), "yes") for g in report.gated
    ]
    cells += [(without_indices(s.path), "", "", "", s.reason) for s in report.skipped]
    return [(name, *row) for row in dict.fromkeys(cells)]


def without_indices(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def page() -> str:
    table = [row for name in sorted(ZOO, key=str.lower) for row in rows(name)]
    supported = {row[0] for row in table if row[5] == "yes"}
    gated = {name for name, row in ZOO.items() if row.gated}
    totals = f"\n{len(ZOO)} models, {len(gated)} with gated MLPs, {len(supported)} supported by NA-LoRA.\n"
    version = importlib.metadata.version("mlx-lm")
    return (
        HEAD.replace("{version}", re.sub(r"\W", "", version))
        + as_lines(known_rows())
        + NOTES_HEAD
        + as_lines(known_export_rows())
        + EXPORT_HEAD
        + as_lines(export_rows())
        + GATED_HEAD.format(version=version)
        + as_lines(table)
        + totals
    )


def as_lines(table: Iterable[tuple[str, ...]]) -> str:
    """Return the rows of a Markdown table."""
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in table)


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        up_to_date = PAGE.exists() and PAGE.read_text() == text
        sys.exit(
            0 if up_to_date else f"{PAGE.relative_to(ROOT)} is out of date; run python scripts/model_table.py"
        )
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}")
