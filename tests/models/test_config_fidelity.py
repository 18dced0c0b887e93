"""What config.json says is computed: every key is read, translated, irrelevant, refused or named in a notice."""

import json
import random
import string

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.lazy_model import open_model, text_args
from nalora_mlx.models import loading
from nalora_mlx.models.config_keys import IRRELEVANT
from nalora_mlx.models.config_translation import translate
from nalora_mlx.models.model_class import _LANGUAGE_MODELS, find_model_class
from tests.conftest import build_model, llama_args
from tests.logit_comparison import relative_error
from tests.miniatures.klear_to_llama import MINIATURES as FIRST
from tests.miniatures.llama4_to_youtu import MINIATURES as SECOND
from tests.models import saved_by_transformers as saved
from tests.models.published_configs import CONFIGS

ZOO = FIRST | SECOND
LOADED_ELSEWHERE = {"olmo"}  # needs a package that is not installed


def write(directory, config, model):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters())) if isinstance(model, nn.Module) else model
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    return directory


# --- against transformers -----------------------------------------------------------------------------------

THETA = 5e5
ROPE = {
    "default": {"rope_type": "default", "rope_theta": THETA},
    "linear": {"rope_type": "linear", "rope_theta": THETA, "factor": 4},
    "dynamic": {"rope_type": "dynamic", "rope_theta": THETA, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": THETA,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": THETA,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "attention_factor": {
        "rope_type": "yarn",
        "rope_theta": THETA,
        "factor": 4.0,
        "attention_factor": 1.3,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "factor": 16.0,
        "original_max_position_embeddings": 8,  # the prompt is longer
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i / 10 for i in range(8)],
    },
}


def compare(directory, model_type, **changes):
    """Return the relative error of our logits, and the notices; raise what loading raises."""
    expected = saved.save(directory, saved.tiny_config(model_type, **changes))
    notices = []
    model, _ = loading.load_module(str(directory), notify=notices.append)
    logits = np.array(model(mx.array([saved.PROMPT])))[0][:, : expected.shape[-1]]
    return relative_error(logits, expected), notices


def per_layer_type(full):
    return {
        "full_attention": ROPE[full],
        "sliding_attention": {"rope_type": "default", "rope_theta": 1234.0},
    }


NO_WINDOW = {"sliding_window": None}
CASES = {
    "llama": {},
    **{f"llama {name}": {"rope_parameters": rope} for name, rope in ROPE.items()},
    "cohere2": {},
    "exaone4": {},
    "gemma3": {},
    **{f"gemma3_text {name}": {"rope_parameters": per_layer_type(name)} for name in ("default", "linear")},
    "gemma4_text": {},
    "glm4": {},
    "gptj": {},
    "mistral yarn": NO_WINDOW | {"rope_parameters": ROPE["yarn"]},
    "mistral3": NO_WINDOW | {"rope_parameters": ROPE["llama3"]},
    "olmo3 yarn": {"rope_parameters": {"full_attention": ROPE["yarn"], "sliding_attention": ROPE["default"]}},
    "phi3 longrope": NO_WINDOW | {"rope_parameters": ROPE["longrope"], "original_max_position_embeddings": 8},
    "qwen2 linear": {"rope_parameters": ROPE["linear"]},
    "qwen3_5": {},
    "qwen3_moe": {},
    "deepseek_v2": {},
    "stablelm": {},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(tmp_path, case):
    error, notices = compare(tmp_path / "model", case.split()[0], **CASES[case])
    assert error < 1e-4
    assert all("longrope" in case and "short_factor" in notice for notice in notices)


DIFFERENT = {
    "glm": ({}, "partial_rotary_factor is 0.5, and mlx-lm's glm rotates all of a head"),
    "qwen3_moe": (
        {"rope_parameters": ROPE["yarn"]},
        "has the type yarn, which mlx-lm's qwen3_moe does not apply",
    ),
    "deepseek_v2": ({"rope_parameters": ROPE["linear"]}, "has the type linear"),
    "mixtral": ({"rope_parameters": ROPE["llama3"]}, "has the type llama3"),
    "llama": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and mlx-lm's llama does not compute it"),
    "gemma3_text": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    "olmoe": ({"clip_qkv": 0.5}, "clip_qkv is 0.5"),
    "qwen2_moe": ({"norm_topk_prob": True}, "norm_topk_prob is True"),
    "olmo3": (
        {"rope_parameters": per_layer_type("default")},
        "rope_parameters differs between full_attention and sliding_attention",
    ),
    "qwen3_vl": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "minicpm3": ({}, "does not scale the logits"),
}


@pytest.mark.parametrize("model_type", DIFFERENT)
def test_what_a_class_cannot_apply_is_refused(tmp_path, model_type):
    changes, message = DIFFERENT[model_type]
    with pytest.raises(InputError, match=message):
        compare(tmp_path / "model", model_type, **changes)


NOTED = {
    "gemma2": "sliding_window is 8, and mlx-lm's gemma2 attends to tokens beyond it",
    "mistral": "sliding_window is 8, and mlx-lm's llama attends to tokens beyond it, because layer_types is absent",
    "starcoder2": "sliding_window is 8",
    "gpt_neox": "hidden_act is 'gelu', and mlx-lm's gpt_neox computes GELU in the other way",
    "jamba": "normalizes the weights of the chosen experts",
}


@pytest.mark.parametrize("model_type", NOTED)
def test_a_difference_of_models_in_use_is_noted(tmp_path, model_type):
    error, notices = compare(tmp_path / "model", model_type)
    assert error > 1e-4  # or the notice would be wrong
    assert any(NOTED[model_type] in notice for notice in notices)


# Types of both libraries whose random models, as transformers saves them, load here and give the same logits.
EQUAL = {
    *("afmoe", "apertus", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1"),
    *("ernie4_5", "exaone", "exaone4", "exaone_moe", "falcon_h1", "falcon_mamba", "gemma3"),
    *("gemma3_text", "gemma4", "gemma4_text", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
    *("gptj", "granite", "granitemoe", "granitemoehybrid", "helium", "hunyuan_v1_dense", "internlm3"),
    *("iquestcoder", "laguna", "lfm2", "lfm2_moe", "llama", "llava", "mamba", "mellum", "minimax_m2"),
    *("minimax_m3_vl", "nemotron", "nemotron_h", "olmo2", "olmo3", "olmoe", "phi", "qwen2"),
    *("qwen2_5_vl", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_5", "qwen3_moe", "qwen3_next", "qwen3_vl"),
    *("recurrent_gemma", "seed_oss", "smollm3", "stablelm"),
}
# Loaded with a notice that says how the results differ.
WITH_NOTICE = {
    *(
        "ernie4_5_moe",
        "gemma",
        "gemma2",
        "gpt_bigcode",
        "gpt_neox",
        "jamba",
        "ministral3",
        "mistral",
        "mistral3",
    ),
    *("mixtral", "phi3", "starcoder2"),
}


def shared_types():
    from mlx_lm.utils import MODEL_REMAPPING

    names = {model_type.replace("-", "_") for model_type in ZOO}
    return sorted(t for t in saved.transformers.CONFIG_MAPPING if MODEL_REMAPPING.get(t, t) in names)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", shared_types())
def test_every_type_that_transformers_saves(tmp_path, model_type):
    try:
        saved.save(tmp_path / "probe", saved.tiny_config(model_type))
    except Exception as error:  # transformers needs another package, or sizes of its own
        assert model_type not in EQUAL | WITH_NOTICE
        pytest.skip(f"transformers cannot build it: {str(error).splitlines()[0]}")
    if model_type not in EQUAL | WITH_NOTICE:
        with pytest.raises(InputError, match=r"cannot be loaded|config\.json"):
            compare(tmp_path / "model", model_type)
        return
    error, notices = compare(tmp_path / "model", model_type)
    assert bool(notices) == (model_type in WITH_NOTICE)
    assert model_type in WITH_NOTICE or error < 1e-4


# --- every key ----------------------------------------------------------------------------------------------

EXPECTED_NOTICES = {
    "Gemma 2 2B": ["sliding_window is 4096"],
    "Mistral 7B v0.1": ["sliding_window is 4096"],
    "Phi 3 mini 4k": ["sliding_window is 2047"],
    "Phi 3.5 mini": ["short_factor"],
    "Phi 4 mini": ["short_factor"],
    "StarCoder2 3B": ["gelu_pytorch_tanh", "sliding_window is 4096"],
    "gpt-oss 20B": ["rope_scaling.truncate is False"],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_load_without_false_alarms(name):
    translation = translate(CONFIGS[name])
    expected = EXPECTED_NOTICES.get(name, [])
    assert translation.problems == []
    assert len(translation.notices) == len(expected)
    assert all(text in notice for text, notice in zip(expected, translation.notices, strict=True))


@pytest.mark.parametrize("name", ["Llama 3.2 1B", "Qwen3.5 4B", "Gemma 4 E2B", "gpt-oss 20B", "DeepSeek V3"])
def test_no_unknown_key_is_swallowed(name):
    generator = random.Random(name)
    known = " ".join(IRRELEVANT.values())
    for _ in range(20):
        words = ["".join(generator.choices(string.ascii_lowercase, k=5)) for _ in range(3)]
        keys = ["_".join(generator.sample([*words, "attention", "scale", "layer"], 3)) for _ in range(4)]
        keys = [key for key in keys if key not in known]
        config = json.loads(json.dumps(CONFIGS[name]))
        text = config.get("text_config", config)
        value = generator.choice([0.5, 3, True, "on", [1], {"a": 1}])
        config[keys[0]] = text[keys[1]] = value
        rope = text.get("rope_parameters") or text.get("rope_scaling")
        (rope.get("full_attention", rope))[keys[2]] = value
        notices = translate(config).notices
        named = [notice for notice in notices if "not known to be irrelevant" in notice]
        assert len(named) == 1
        assert {keys[0], keys[1], f"rope_parameters.{keys[2]}"} == set(
            named[0].rpartition(": ")[2].split(", ")
        )


VALUES = [
    ("Llama 3.2 1B", {"pretraining_tp": 2, "attention_dropout": 0.3}, None),
    ("Llama 3.2 1B", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ("Llama 3.2 1B", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    ("Llama 3.2 1B", {"attn_logit_softcapping": None}, None),
    ("Llama 3.2 1B", {"residual_multiplier": 0.2}, "residual_multiplier"),
    ("Llama 3.2 1B", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("Llama 3.2 1B", {"rope_scaling": {"rope_type": "new", "factor": 2.0}}, "has the type new"),
    ("Qwen3 30B A3B", {"mlp_only_layers": [0]}, None),  # the class reads it
    ("Gemma 2 2B", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "has the type linear"),
    (
        "Command R7B",
        {"sliding_window_pattern": None, "layer_types": ["full_attention"] * 31 + ["x"]},
        "layer_types",
    ),
    (
        "Gemma 3 1B",
        {"layer_types": ["full_attention", "sliding_attention"] * 13},
        "layer_types is not periodic",
    ),
    ("Mixtral 8x7B", {"rope_theta": None}, None),
    ("DeepSeek V2 Lite", {"norm_topk_prob": True}, "norm_topk_prob is True"),
]


@pytest.mark.parametrize(("name", "changes", "problem"), VALUES)
def test_a_key_may_matter_at_some_values_only(name, changes, problem):
    problems = translate(CONFIGS[name] | changes).problems
    assert (problems == []) if problem is None else any(problem in text for text in problems)


# --- every class of mlx-lm ----------------------------------------------------------------------------------


def arguments(config):
    """Return what mlx-lm's class makes of a config, without weights."""
    from mlx_lm.utils import _get_classes

    model, args = _get_classes(config)
    return model(args.from_dict(config))


def rope_bases(model):
    return sorted(
        module.base for _, module in model.named_modules() if isinstance(module, nn.RoPE) and module.base
    )


def zoo_config(name):
    config = json.loads(json.dumps(ZOO[name].config))
    return {"model_type": name} | config


@pytest.mark.parametrize("name", sorted(ZOO.keys() - LOADED_ELSEWHERE))
def test_every_class_gets_its_rope_base_from_rope_parameters(name):
    config = zoo_config(name)
    text = config.get("text_config", config)
    old = json.loads(json.dumps(config))
    old_text = old.get("text_config", old)
    old_text.pop("rope_parameters", None)
    old_text["rope_theta"] = old_text["rotary_emb_base"] = 54321.0
    plain = json.loads(json.dumps(old))
    (plain.get("text_config", plain)).update(rope_theta=4444.0, rotary_emb_base=4444.0)
    try:
        expected, other = rope_bases(arguments(old)), rope_bases(arguments(plain))
    except Exception:
        pytest.skip("reads rope_parameters only")
    if expected == other:
        pytest.skip("has no base in its config")
    for key in ("rope_theta", "rotary_emb_base", "rope_scaling"):
        text.pop(key, None)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 54321.0}
    translation = translate(config)
    assert rope_bases(arguments(config | translation.overrides)) == expected


@pytest.mark.parametrize("name", sorted(_LANGUAGE_MODELS.keys() & ZOO.keys()))
def test_the_class_of_a_language_model_is_found(name):
    config = zoo_config(name)
    found = find_model_class(config)
    args = text_args(arguments(json.loads(json.dumps(config))), found.text_args)
    assert type(args) is found.text_args


def test_no_other_class_has_a_language_model_within():
    for name in ZOO.keys() - _LANGUAGE_MODELS.keys() - LOADED_ELSEWHERE:
        assert not isinstance(getattr(arguments(zoo_config(name)), "language_model", None), nn.Module)


# --- loading ------------------------------------------------------------------------------------------------


def test_the_returned_config_is_that_of_the_file(tmp_path):
    config = llama_args() | {"rope_parameters": ROPE["llama3"], "eos_token_id": 2}
    config.pop("rope_theta", None)
    directory = write(tmp_path / "model", config, build_model(args=llama_args()))
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert loading.load_module(str(directory))[1] == config
    model, quantized = loading.load_module(str(directory), quantize=4)
    assert {k: v for k, v in quantized.items() if not k.startswith("quantization")} == config
    assert quantized["quantization"]["bits"] == 4
    assert model.args.rope_theta == THETA


@pytest.mark.parametrize("said", [None, False])
def test_an_output_head_in_the_weights_is_used(tmp_path, said):
    args = llama_args(tie_word_embeddings=False)
    model = build_model(args=args)
    config = {k: v for k, v in args.items() if k != "tie_word_embeddings"}
    config |= {} if said is None else {"tie_word_embeddings": said}
    directory = write(tmp_path / "model", config, model)
    loaded, _ = loading.load_module(str(directory))
    prompt = mx.array([[1, 2, 3]])
    assert relative_error(np.array(loaded(prompt)), np.array(model(prompt))) < 1e-6


def test_what_the_outer_config_says_about_the_output_head_counts(tmp_path):
    args = llama_args(tie_word_embeddings=True)
    model = build_model(args=args)
    weights = {f"language_model.{name}": array for name, array in tree_flatten(model.parameters())}
    text = {k: v for k, v in args.items() if k != "tie_word_embeddings"}
    config = {"model_type": "mistral3", "tie_word_embeddings": True, "text_config": text}
    loaded, _ = loading.load_module(str(write(tmp_path / "model", config, weights)))
    prompt = mx.array([[1, 2, 3]])
    assert relative_error(np.array(loaded(prompt)), np.array(model(prompt))) < 1e-6


def test_an_export_reads_what_the_class_reads(tmp_path):
    model = build_model(args=llama_args())
    weights = {f"language_model.{name}": array for name, array in tree_flatten(model.parameters())}
    text = llama_args(rope_parameters=ROPE["llama3"], max_position_embeddings=512)
    config = {"model_type": "mistral3", "text_config": text, "eos_token_id": 7}
    opened = open_model(write(tmp_path / "model", config, weights))
    assert isinstance(opened.args, llama.ModelArgs)
    assert opened.args.rope_theta == opened.config["rope_theta"] == THETA
    assert opened.args.rope_scaling["rope_type"] == opened.config["rope_scaling"]["rope_type"] == "llama3"
    assert opened.config["max_position_embeddings"] == 512
    assert (opened.config["model_type"], opened.config["eos_token_id"]) == ("mistral3", 7)
    assert opened.problems == []


def test_mlx_lms_own_commands_read_the_translated_config(model_directory, tmp_path, capsys):
    from mlx_lm import load

    from nalora_mlx.cli import loading_configured

    directory = tmp_path / "model"
    directory.mkdir()
    for file in model_directory.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    config |= {"rope_parameters": ROPE["linear"], "rope_theta": None, "strange_key": 1}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    configured = loading_configured(load, {"chat_template": None, "chat_template_args": None})
    model, _, _ = configured(
        str(directory), tokenizer_config={}, model_config={"quantize_activations": False}, return_config=True
    )
    assert (model.args.rope_theta, model.args.rope_scaling["factor"]) == (THETA, 4.0)
    assert capsys.readouterr().err.count("strange_key") == 1
    draft, _ = configured(str(directory))
    assert draft.args.rope_theta == THETA


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], r"only \*.bin; load it in transformers and save it"),
        (["model-q4.gguf"], "only GGUF; .*gguf_file='model-q4.gguf'"),
        ([], "has no model\\*.safetensors.*download the model again"),
        (["consolidated.safetensors"], "has no model\\*.safetensors"),
    ],
)
def test_weights_of_another_kind_are_named(tmp_path, files, message):
    (tmp_path / "config.json").write_text(json.dumps(llama_args()))
    for file in files:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(InputError, match=message):
        loading.check_files(str(tmp_path))


def test_missing_shards_and_arrays_are_named(tmp_path):
    model = build_model(args=llama_args())
    weights = dict(tree_flatten(model.parameters()))
    name, _ = weights.popitem()
    directory = write(tmp_path / "model", llama_args(), weights)
    with pytest.raises(InputError, match=f"Missing 1 parameters: {name}"):
        loading.load_module(str(directory))
    shards = {"model.safetensors": "a", "model-00002-of-00003.safetensors": "b"}
    index = {"weight_map": {array: file for file, array in shards.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        InputError, match=r"model-00002-of-00003\.safetensors is missing, which .*index\.json lists"
    ):
        loading.load_module(str(directory))


def rope_state(model):
    """Return what the RoPE modules of a model compute with."""
    return {
        path: (
            getattr(module, "base", None),
            getattr(module, "scale", None),
            getattr(module, "factor", None),
            None if getattr(module, "_freqs", None) is None else np.array(module._freqs).tolist(),
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.RoPE) or hasattr(module, "_freqs") or hasattr(module, "factor")
    }


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
def test_every_class_applies_a_scaling_or_is_refused(kind):
    ignored = []
    for name in sorted(ZOO.keys() - LOADED_ELSEWHERE):
        states = []
        for scaling in (ROPE["default"], ROPE[kind]):
            config = zoo_config(name)
            text = config.get("text_config", config)
            if any(isinstance(value, dict) for value in (text.get("rope_parameters") or {}).values()):
                break  # per layer type
            extra = {k: v for k, v in (text.get("rope_parameters") or {}).items() if "llama_4" in k}
            for key in ("rope_theta", "rope_scaling"):
                text.pop(key, None)
            text["rope_parameters"] = scaling | extra
            translation = translate(config)
            if translation.problems:
                break
            try:
                states.append(rope_state(arguments(config | translation.overrides)))
            except (KeyError, ValueError):  # loading turns them into refusals
                break
        if len(states) == 2 and states[0] and states[0] == states[1]:
            ignored.append(name)
    assert ignored == []
