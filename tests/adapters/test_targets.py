"""The keys that are adapted by default: recurrent and hybrid models, and routers that are modules of their own."""

import inspect

import pytest

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.descriptions import group_layers, group_reasons
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.adapters.targets import BLOCKED, GATE, ROUTER, select_targets
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError
from tests.adapters.test_miniatures import NAMES, build, load_module

GLU = "gate_proj up_proj down_proj"
QKVO = "q_proj k_proj v_proj o_proj"
MLA = "q_a_proj q_b_proj kv_a_proj_with_mqa"
DENSE = {"mlp": GLU}
EXPERTS = {"mlp.switch_mlp": GLU, "mlp.shared_experts": GLU}
QWEN_EXPERTS = {"mlp.switch_mlp": GLU, "mlp.shared_expert": GLU}
QWEN_GATES = {"mlp": "gate shared_expert_gate"}
LOW_RANK = "f_a_proj f_b_proj g_a_proj g_b_proj b_proj"
DELTA = {"linear_attn": "in_proj_qkv in_proj_z out_proj", "self_attn": QKVO}
RWKV = {f"attn.{name}_lora.lora": "0 2" for name in "wavg"}
# Model type -> the keys adapted by default, the gates of its recurrence, its routers; each as module -> names.
KEYS = {
    "baichuan_m1": ({"self_attn": "W_pack o_proj", **DENSE}, {}, {}),
    "bailing_hybrid": (
        {"attention": f"query_key_value g_proj dense {MLA}", **DENSE, **EXPERTS},
        {},
        {"mlp.gate": "gate_proj"},
    ),
    "bailing_moe_linear": (
        {"attention": "query_key_value g_proj dense", **DENSE, **EXPERTS},
        {},
        {"mlp.gate": "gate_proj"},
    ),
    "bailing_moe_v3": (
        {"attention": f"{QKVO} g_proj dense {MLA}", **DENSE, **EXPERTS},
        {"attention": "b_proj f_proj"},
        {},
    ),
    "falcon_h1": ({"mamba": "in_proj out_proj", "self_attn": QKVO, "feed_forward": GLU}, {}, {}),
    "gear": ({"local_mixer": QKVO, "self_attn": QKVO, **DENSE}, {}, {}),
    "granitemoehybrid": (
        {
            "mamba": "in_proj out_proj",
            "self_attn": QKVO,
            "block_sparse_moe.switch_mlp": GLU,
            "shared_mlp": "input_linear output_linear",
        },
        {},
        {"block_sparse_moe.router": "layer"},
    ),
    "jamba": (
        {
            "mamba": "in_proj out_proj",
            "self_attn": QKVO,
            "feed_forward": GLU,
            "feed_forward.switch_mlp": GLU,
        },
        {"mamba": "x_proj dt_proj"},
        {"feed_forward": "router"},
    ),
    "kimi_k3": (
        {
            "self_attn": f"qkv_proj o_proj {MLA}",
            "mlp": f"{GLU} routed_expert_down_proj routed_expert_up_proj",
            **EXPERTS,
        },
        {"self_attn": LOW_RANK},
        {"mlp": "gate"},
    ),
    "kimi_linear": (
        {"self_attn": f"{QKVO} kv_a_proj_with_mqa", **DENSE, **EXPERTS},
        {"self_attn": LOW_RANK},
        {"mlp": "gate"},
    ),
    "lfm2": (
        {
            "conv": "in_proj out_proj",
            "self_attn": "q_proj k_proj v_proj out_proj",
            "feed_forward": "w1 w2 w3",
        },
        {},
        {},
    ),
    "lfm2_moe": (
        {
            "conv": "in_proj out_proj",
            "self_attn": "q_proj k_proj v_proj out_proj",
            "feed_forward": GLU,
            "feed_forward.switch_mlp": GLU,
        },
        {},
        {"feed_forward": "gate"},
    ),
    "longcat_flash_ngram": (
        {
            "self_attn.0": f"{MLA} o_proj",
            "self_attn.1": f"{MLA} o_proj",
            "mlps.0": GLU,
            "mlps.1": GLU,
            "mlp.switch_mlp": GLU,
        },
        {},
        {"mlp.router": "classifier"},
    ),
    "mamba": ({"mixer": "in_proj out_proj"}, {"mixer": "x_proj dt_proj"}, {}),
    "mamba2": ({"mixer": "in_proj out_proj"}, {}, {}),
    "muse_glimmer": ({"self_attn": f"{QKVO} gate_proj", **DENSE}, {}, {}),
    "muse_spark": (
        {
            "self_attn": "qkvg_proj o_proj",
            "mlp": "pre_expert_proj post_expert_proj",
            "mlp.experts": GLU,
        },
        {},
        {},
    ),
    "nemotron_h": (
        {
            "mixer": f"in_proj out_proj {QKVO} up_proj down_proj fc1_latent_proj fc2_latent_proj",
            "mixer.shared_experts": "up_proj down_proj",
            "mixer.switch_mlp": "fc1 fc2",
        },
        {},
        {},
    ),
    "olmo_hybrid": (
        {"linear_attn": f"{QKVO} g_proj", "self_attn": QKVO, **DENSE},
        {"linear_attn": "a_proj b_proj"},
        {},
    ),
    "plamo2": (
        {"mixer": "in_proj out_proj qkv_proj o_proj", "mlp": "gate_up_proj down_proj"},
        {"mixer": "bcdt_proj dt_proj"},
        {},
    ),
    "prism_hadamard_qwen35": (DELTA, {"linear_attn": "in_proj_a in_proj_b"}, {}),
    "qwen3_5": ({**DELTA, **DENSE}, {"linear_attn": "in_proj_a in_proj_b"}, {}),
    "qwen3_5_moe": ({**DELTA, **QWEN_EXPERTS}, {"linear_attn": "in_proj_a in_proj_b"}, QWEN_GATES),
    "qwen3_next": (
        {"linear_attn": "in_proj_qkvz out_proj", "self_attn": QKVO, **DENSE, **QWEN_EXPERTS},
        {"linear_attn": "in_proj_ba"},
        QWEN_GATES,
    ),
    "recurrent_gemma": ({"temporal_block": f"linear_x linear_y linear_out {QKVO}", "mlp_block": GLU}, {}, {}),
    "rwkv7": ({"attn": "r_proj k_proj v_proj o_proj", "ffn": "key value"}, RWKV, {}),
}
# Routers that are not a direct sibling of their experts.
NESTED_ROUTERS = {
    "afmoe": "mlp.router.gate",
    "bailing_moe": "mlp.gate.gate_proj",
    "dbrx": "ffn.router.layer",
    "gemma4_text": "router.proj",
    "granitemoe": "block_sparse_moe.router.layer",
    "hunyuan": "mlp.gate.wg",
    "laguna": "mlp.gate.proj",
    "longcat_flash": "mlp.router.classifier",
    "step3p5": "mlp.gate.gate",
}
ALL_LAYERS = NALoRAConfig(num_layers=-1, rank=2)


def paths(modules):
    return {f"{module}.{name}" for module, names in modules.items() for name in names.split()}


def keys_left_out(targets, reason):
    return {key for key, why in targets.left_out.items() if why == reason}


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("qwen2", "q_proj", "'q_proj' names no .*; did you mean 'self_attn.q_proj'\\?"),
        ("qwen2", "layers.mlp.up_proj", "did you mean 'mlp.up_proj'\\?"),
        ("qwen2", "q_proj,v_proj", "separate keys by spaces: --keys q_proj v_proj"),
        ("qwen2", "all-linear", "leave keys out to adapt all linear and embedding layers"),
        (
            "jamba",
            "gate_proj",
            "did you mean 'feed_forward.gate_proj' or 'feed_forward.switch_mlp.gate_proj'",
        ),
        ("qwen2", "zzz", "known names: .*self_attn.q_proj"),
    ],
)
def test_a_wrong_key_comes_with_the_keys_that_the_model_has(name, key, message):
    with pytest.raises(InputError, match=message):
        select_targets(build(name), NALoRAConfig(keys=(key,), num_layers=-1))


@pytest.mark.parametrize("name", KEYS)
def test_gates_and_routers_are_left_out_by_default(name):
    keys, gates, routers = map(paths, KEYS[name])
    targets = select_targets(build(name), ALL_LAYERS)
    assert set(targets.keys) == keys
    assert keys_left_out(targets, GATE) == gates
    assert keys_left_out(targets, ROUTER) == routers
    blocked = {f"mlp.{part}" for part in GLU.split()} if name == "prism_hadamard_qwen35" else set()
    assert keys_left_out(targets, BLOCKED) == blocked


@pytest.mark.parametrize("name", NESTED_ROUTERS)
def test_routers_with_a_module_of_their_own_are_left_out(name):
    assert select_targets(build(name), ALL_LAYERS).left_out == {NESTED_ROUTERS[name]: ROUTER}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in KEYS and name != "bitnet"])
def test_no_other_model_has_gates_of_a_recurrence(name):
    """No other projection in mlx-lm has the name of a gate. Bitnet is left out, because no adapter fits its layers."""
    targets = select_targets(build(name), ALL_LAYERS)
    assert not keys_left_out(targets, GATE)


def test_the_gates_of_a_recurrence_can_be_named():
    model = build("qwen3_5")
    keys = ("linear_attn.in_proj_a", "mlp.gate_proj")
    result = adapt(model, NALoRAConfig(num_layers=-1, rank=2, keys=keys))
    assert result.left_out == {}
    recurrent = [name for name in adapter_weights(model) if "linear_attn" in name]
    assert recurrent == [
        "language_model.model.layers.0.linear_attn.in_proj_a.lora_a",
        "language_model.model.layers.0.linear_attn.in_proj_a.lora_b",
    ]


def test_every_recurrent_model_is_in_the_table():
    """A model of mlx-lm is recurrent if its layers keep a state other than keys and values."""
    recurrent = {name for name in NAMES if "ArraysCache" in inspect.getsource(load_module(name))}
    assert recurrent <= KEYS.keys()


def test_layers_are_grouped_by_number():
    items = [(f"a.{number}.b.1", "x") for number in (0, 1, 2, 5, 7, 8)] + [("a.3.b.1", "y"), ("c", "x")]
    assert list(group_layers(items)) == [("a.0-2,5,7-8.b.1", "x"), ("a.3.b.1", "y"), ("c", "x")]


def test_keys_are_grouped_by_reason():
    assert group_reasons({"a": GATE, "b": ROUTER, "c": GATE}) == f"a, c ({GATE}); b ({ROUTER})"
