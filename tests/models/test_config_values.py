"""Values in config.json that contradict each other, are invalid, or are written in another way by transformers."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from nalora_mlx.core.errors import InputError
from nalora_mlx.models import loading
from nalora_mlx.models.config_translation import translate
from tests.conftest import build_model, llama_args
from tests.logit_comparison import relative_error
from tests.models import saved_by_transformers as saved
from tests.models.published_configs import CONFIGS

YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def logits_of_both(directory, model_type, edit=None, **changes):
    """Return logits of transformers and ours for a model whose config.json is edited after saving, and notices."""
    saved.save(directory, saved.tiny_config(model_type, **changes))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if edit is not None:
        edit(config)
        path.write_text(json.dumps(config))
    reference = saved.transformers.AutoModelForCausalLM.from_pretrained(directory).float().eval()
    with saved.torch.no_grad():
        expected = reference(saved.torch.tensor([saved.PROMPT]), use_cache=False).logits[0].numpy()
    notices = []
    model, _ = loading.load_module(str(directory), notify=notices.append)
    return expected, np.array(model(mx.array([saved.PROMPT])))[0], notices, config


def is_mixed(config):
    kinds = {type(value) is dict for value in config["rope_parameters"].values()}
    return kinds == {True, False}


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [("olmo3", YARN), ("gemma3_text", {"rope_type": "default", "rope_theta": 5e4})],
)
def test_settings_per_layer_type_win_over_those_beside_them(tmp_path, model_type, rope):
    expected, ours, notices, config = logits_of_both(tmp_path / "model", model_type, rope_parameters=rope)
    assert is_mixed(config)
    assert relative_error(ours, expected) < 1e-4
    assert notices == []


def test_a_layer_type_without_settings_is_refused():
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": None}
    config = CONFIGS["Gemma 3 1B"] | {
        "rope_parameters": rope,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2,
    }
    assert any("rope_parameters.sliding_attention is None" in text for text in translate(config).problems)
    both = {"rope_type": "default", "full_attention": LLAMA3}
    problems = translate(CONFIGS["Llama 3.2 1B"] | {"rope_parameters": both, "rope_scaling": None}).problems
    assert any("has settings for full_attention beside others" in text for text in problems)


def test_sizes_of_single_layers_are_read(tmp_path):
    directory = tmp_path / "model"
    expected, ours, _, config = logits_of_both(directory, "gemma4_text", attention_k_eq_v=True)
    assert config["per_layer_config"]
    assert "global_head_dim" not in config
    assert relative_error(ours, expected) < 1e-4
    for entry in config["per_layer_config"].values():
        entry["num_key_value_heads"] = 1
    assert translate(config).overrides["num_global_key_value_heads"] == 1
    config["per_layer_config"] |= {"0": {"head_dim": 64}}
    assert any("per_layer_config is not the same" in text for text in translate(config).problems)


def test_a_time_step_without_limit_is_not_limited(tmp_path):
    def edit(config):
        del config["time_step_limit"]

    expected, ours, _, _ = logits_of_both(tmp_path / "model", "granitemoehybrid", edit)
    assert relative_error(ours, expected) < 1e-4
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert translate(config).overrides["time_step_limit"] == [0.0, float("inf")]
    assert loading.load_module(str(tmp_path / "model"))[1] == config  # not in what is saved


def test_rope_type_wins_over_type(tmp_path):
    def edit(config):
        del config["rope_parameters"]
        config |= {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "linear"}}

    expected, ours, _, _ = logits_of_both(tmp_path / "model", "llama", edit)
    assert relative_error(ours, expected) < 1e-4


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, None),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 1e4}}, "rope_theta and rope_parameters.rope_theta"),
        ({"rope_parameters": YARN}, "rope_parameters and rope_scaling contradict"),
    ],
)
def test_two_ways_to_write_rope_must_agree(changes, problem):
    config = CONFIGS["Llama 3.2 1B"] | {"rope_theta": 5e5, "rope_scaling": LLAMA3} | changes
    problems = translate(config).problems
    assert (problems == []) if problem is None else any(problem in text for text in problems)


INVALID = [
    ({"rope_parameters": [1]}, "rope_parameters is [1], but must be an object or null"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear', but must be an object"),
    ({"rope_scaling": 2.0}, "rope_scaling is 2.0, but must be an object"),
    ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "rope_scaling has a factor, but no type"),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        "rope_scaling.factor is 0, but must be a positive",
    ),
    ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "rope_scaling.factor is None"),
    ({"rope_scaling": {"rope_type": 3, "factor": 2.0}}, "rope_scaling.rope_type is 3"),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": -1}}},
        "rope_parameters.full_attention.rope_theta is -1",
    ),
    ({"rope_theta": "1e4"}, "rope_theta is '1e4', but must be a positive number"),
    ({"rope_theta": 10**400}, "rope_theta is 1000"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', but must be a number"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1, but must be a positive integer"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"intermediate_size": 8.5}, "intermediate_size is 8.5"),
    ({"layer_types": ["full_attention"]}, "layer_types has 1 names, but num_hidden_layers is 16"),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention', but must be a list of names"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', but must be true or false"),
    ({"text_config": "x"}, "text_config is 'x', but must be an object"),
    ({"text_config": {"head_dim": 0}}, "text_config.head_dim is 0"),
    ({"quantization": "4bit"}, "quantization is '4bit', but must be an object"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config says gptq"),
]


@pytest.mark.parametrize(("changes", "message"), INVALID)
def test_an_invalid_value_is_named(changes, message):
    with pytest.raises(ValueError) as caught:
        translate(CONFIGS["Llama 3.2 1B"] | changes, ["model.embed_tokens.weight"])
    assert message in str(caught.value)


def test_all_invalid_values_are_named_when_a_model_is_loaded(tmp_path):
    config = llama_args() | {"num_attention_heads": 0, "rms_norm_eps": "1"}
    directory = write(
        tmp_path / "model", config, dict(tree_flatten(build_model(args=llama_args()).parameters()))
    )
    with pytest.raises(InputError, match=r"config\.json: num_attention_heads is 0.*; rms_norm_eps is '1'"):
        loading.load_module(str(directory))


def test_keys_in_notices():
    config = CONFIGS["Llama 3.2 1B"] | {"_gguf_architecture": "llama", "a\nb": 1, "": 2}
    (notice,) = translate(config).notices
    assert notice.endswith(r": '', 'a\nb'")


def write(directory, config, weights):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    return directory


@pytest.mark.parametrize(("change", "tied"), [(0, True), (1e-3, True), (1e-3, False)])
def test_an_unused_output_head_is_named_if_it_differs(tmp_path, change, tied):
    args = llama_args(tie_word_embeddings=tied)
    weights = dict(tree_flatten(build_model(args=args).parameters()))
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = mx.where(mx.arange(len(embedding))[:, None] == len(embedding) - 1, change, 0)
    weights["lm_head.weight"] = (embedding + weights["lm_head.weight"]).astype(embedding.dtype)
    notices = []
    loading.load_module(str(write(tmp_path / "model", args, weights)), notify=notices.append)
    assert len(notices) == (tied and change > 0)
    assert all("lm_head.weight, which differs from the embedding and is not used" in text for text in notices)
