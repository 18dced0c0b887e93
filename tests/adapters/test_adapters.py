"""Attaching, merging, saving and loading adapters, compared with mlx-lm's own modules and loader."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma, llama, mixtral
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from nalora_mlx.adapters import layouts
from nalora_mlx.adapters.attach import adapt, adapt_dora, adapt_result, gated_mlps
from nalora_mlx.adapters.files import adapter_config, adapter_weights, load_adapter, load_weights
from nalora_mlx.adapters.gated_mlps import GatedMLP
from nalora_mlx.adapters.layers import Dropout, LoRASwitchLinear, dequantized
from nalora_mlx.adapters.merge import fuse_model, fuse_module
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError
from tests.conftest import VOCABULARY, build_model, llama_args, random_adapters
from tests.logit_comparison import close

TOKENS = mx.array([[3, 9, 27, 4, 12], [1, 5, 25, 61, 2]])
GEMMA = {
    "model_type": "gemma",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
}
MIXTRAL = llama_args(
    model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
)
QUANTIZATIONS = [(4, "affine"), (8, "affine"), (4, "mxfp4"), (8, "mxfp8"), (4, "nvfp4")]


def logits(model):
    out = model(TOKENS)
    mx.eval(out)
    return np.array(out.astype(mx.float32))


def relative(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def quantize(model, bits, mode):
    # Small groups, since the tiny model has short rows.
    nn.quantize(
        model,
        {"affine": 32, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}[mode],
        bits,
        mode=mode,
        class_predicate=lambda p, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0,
    )
    mx.eval(model.parameters())
    return model


def tree(model):
    return [(path, type(module)) for path, module in model.named_modules()]


def test_adapting_does_not_change_outputs(model):
    before = logits(model)
    report = adapt(model, NALoRAConfig(num_layers=2))
    np.testing.assert_array_equal(logits(model), before)
    assert [g.path for g in report.gated] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert {g.activation for g in report.gated} == {"silu"}
    assert report.skipped == []
    assert len(report.plain) == 8  # q, k, v, o of two layers
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in adapter_weights(model))


@pytest.mark.parametrize(("bits", "mode"), QUANTIZATIONS)
def test_adapting_a_quantized_model_does_not_change_outputs(bits, mode):
    model = quantize(build_model(args=llama_args(intermediate_size=64)), bits, mode)
    before = logits(model)
    report = adapt(model, NALoRAConfig(num_layers=-1))
    assert len(report.gated) == 3, report.skipped
    assert relative(logits(model), before) < 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_models_get_float32_adapters_and_keep_their_activations(dtype):
    model = build_model(dtype=dtype)
    before = logits(model)
    adapt(model, NALoRAConfig(num_layers=-1))
    assert {a.dtype for a in adapter_weights(model).values()} == {mx.float32}
    assert model(TOKENS).dtype == dtype
    # To the last bit: the rebuilt MLP rounds after every operation, as the model does.
    np.testing.assert_array_equal(logits(model), before)


def test_activations_are_identified_by_probing():
    model = build_model(module=gemma, args=GEMMA)
    report = adapt(model, NALoRAConfig(num_layers=-1))
    assert {g.activation for g in report.gated} == {"gelu"}
    for name in ("silu", "gelu_tanh", "relu2", "sigmoid"):
        mlp = _SmallMLP(name)
        match = layouts.find_gated_mlps(mlp)[0]
        assert layouts.identify(match)[1].name == name


def test_a_learned_activation_is_identified_with_its_parameters():
    """xIELU, which mlx-lm uses in MLPs without a gate only, is identified in a gated MLP."""
    from mlx_lm.models.activations import XieLU

    mlp = _SmallMLP()
    mlp.act_fn = XieLU(0.9, 0.7, 0.4)
    mlp._function = mlp.act_fn
    _, activation = layouts.identify(layouts.find_gated_mlps(mlp)[0])
    assert activation.name == "xielu"
    z = mx.array([-3.0, -0.5, 0.5, 4.0])
    want = mx.grad(lambda z: mlp.act_fn(z).sum())(z)
    np.testing.assert_allclose(np.array(activation.derivative(z)), np.array(want), rtol=1e-5)


class _SmallMLP(nn.Module):
    """A gated MLP, optionally with a deviation that its attribute names do not show."""

    def __init__(self, activation="silu", factor=1.0, swapped=False, extra=None, leak=0.0):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down_proj = nn.Linear(48, 32, bias=False)
        self._function = {
            "silu": nn.silu,
            "gelu_tanh": nn.gelu_approx,
            "relu2": nn.relu2,
            "sigmoid": mx.sigmoid,
            "cube": lambda z: z**3,
        }[activation]
        self._factor, self._swapped, self._needs, self._leak = factor, swapped, extra, leak

    def __call__(self, x):
        z, u = self.gate_proj(x), self.up_proj(x)
        if self._swapped:
            z, u = u, z
        if self._needs:
            z = self._needs(z)
        return self.down_proj(self._function(z) * u) * self._factor + self._leak * x.sum()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"activation": "cube"}, "activation"),
        ({"factor": 0.5}, "its activation is unknown"),
        ({"swapped": True}, "activation"),
        (
            {"leak": 0.1},
            "output differs from the original's",
        ),  # probes run with a zero input, so they do not see this
        ({"extra": lambda z: mx.clip(z, -1, 1)}, "activation"),
        ({"extra": lambda z: z @ mx.zeros((3, 3))}, "more than the projections"),
    ],
)
def test_an_unidentified_mlp_keeps_plain_lora_with_a_reason(model, settings, reason):
    model.model.layers[1].mlp = odd = _SmallMLP(**settings)
    if "extra" in settings and "more" in reason:
        with pytest.raises(ValueError, match=reason):
            layouts.identify(next(m for m in layouts.find_gated_mlps(model) if m.module is odd))
        return
    before = logits(model)
    report = adapt(model, NALoRAConfig(num_layers=-1))
    assert [g.path for g in report.gated] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert [s.path for s in report.skipped] == ["model.layers.1.mlp"]
    assert reason in report.skipped[0].reason
    assert model.model.layers[1].mlp is odd
    assert "model.layers.1.mlp.gate_proj.lora_a" in adapter_weights(model)
    np.testing.assert_array_equal(logits(model), before)


def test_verification_detects_a_wrong_weight(model):
    """The rebuilt module is compared as a whole, since probes do not see its weights."""
    match = layouts.find_gated_mlps(model)[0]
    adapt(model, NALoRAConfig(num_layers=-1))
    rebuilt = model.model.layers[0].mlp
    rebuilt.up_proj.linear = nn.Linear(32, 48, bias=False)
    with pytest.raises(ValueError, match="output differs"):
        layouts.verify(match, rebuilt, mx.float32)


@pytest.mark.parametrize(
    "keys", [None, ("mlp.gate_proj",), ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")]
)
def test_outputs_and_gradients_equal_mlx_lms(keys):
    ours, theirs = build_model(), build_model()
    adapt(ours, NALoRAConfig(num_layers=2, rank=4, scale=3.0, keys=keys))
    theirs.freeze()
    settings = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": adapt_result(ours).config.keys}
    linear_to_lora_layers(theirs, 2, settings)
    random_adapters(ours)
    weights = adapter_weights(ours)
    assert weights.keys() == dict(tree_flatten(theirs.trainable_parameters())).keys()
    theirs.load_weights(list(weights.items()), strict=False)
    assert relative(logits(ours), logits(theirs)) < 1e-6

    def loss(model):
        return mx.square(model(TOKENS)).mean()

    got = dict(tree_flatten(nn.value_and_grad(ours, loss)(ours)[1]))
    want = dict(tree_flatten(nn.value_and_grad(theirs, loss)(theirs)[1]))
    for name in want:
        assert relative(np.array(got[name]), np.array(want[name])) < 1e-5, name


def test_merging_restores_the_module_tree_and_keeps_the_outputs(model):
    before_tree, plain = tree(model), logits(model)
    adapt(model, NALoRAConfig(num_layers=-1, scale=2.0))
    random_adapters(model)
    adapted = logits(model)
    merged = fuse_model(model)
    assert tree(model) == before_tree
    assert len(merged) == 3 * 7
    close(logits(model), adapted, plain, 1e-5)
    assert adapt_result(model) is None
    adapt(model)  # a merged model can be adapted again


def test_merging_into_a_quantized_model():
    base = quantize(build_model(), 4, "affine")
    frozen = {
        name: np.array(a)
        for name, a in tree_flatten(base.parameters())
        if "layers.0" in name and "mlp" not in name
    }
    adapt(base, NALoRAConfig(num_layers=-1, keys=("mlp.gate_proj", "mlp.up_proj"), scale=2.0))
    unadapted = logits(base)
    random_adapters(base, size=0.2)
    want = logits(base)
    effect = np.abs(want - unadapted).max()
    errors = {}
    for bits, dequantize in ((8, False), (None, False), (8, True)):
        model = quantize(build_model(), 4, "affine")
        adapt(model, NALoRAConfig(num_layers=-1, keys=("mlp.gate_proj", "mlp.up_proj"), scale=2.0))
        model.load_weights(list(adapter_weights(base).items()), strict=False)
        merged = fuse_model(model, bits, dequantize)
        errors[bits, dequantize] = np.abs(logits(model) - want).max() / effect
        assert all(isinstance(m, nn.Linear if dequantize else nn.QuantizedLinear) for m in merged.values())
        for name, array in tree_flatten(model.parameters()):
            if name in frozen:
                np.testing.assert_array_equal(np.array(array), frozen[name])
    assert errors[8, True] < 1e-4
    assert errors[8, False] < 0.1
    assert errors[None, False] > 2 * errors[8, False]


def test_routers_are_not_adapted_by_default():
    model = build_model(module=mixtral, args=MIXTRAL)
    before = logits(model)
    report = adapt(model, NALoRAConfig(num_layers=-1))
    assert not any(".gate." in name for name in adapter_weights(model))
    assert {g.experts for g in report.gated} == {4}
    np.testing.assert_allclose(logits(model), before, rtol=1e-5, atol=1e-5)
    named = build_model(module=mixtral, args=MIXTRAL)
    report = adapt(named, NALoRAConfig(num_layers=-1, keys=("block_sparse_moe.gate",)))
    assert any(name.endswith("block_sparse_moe.gate.lora_a") for name in adapter_weights(named))
    assert any("acts nowhere" in n for n in report.notices)


def test_unknown_keys(model):
    with pytest.raises(InputError, match=r"'mlp.gate'.*did you mean 'mlp.gate_proj'"):
        adapt(model, NALoRAConfig(keys=("mlp.gate",)))
    report = adapt(model, NALoRAConfig(keys=("mlp.gate_proj", "mlp.nothing")))
    assert any("mlp.nothing" in n for n in report.notices)
    assert any("num_layers is 16, but the model has 3 layers" in n for n in report.notices)


def test_keys_outside_the_layers(model):
    plain = logits(model)
    adapt(model, NALoRAConfig(num_layers=1, keys=("mlp.gate_proj", "model.embed_tokens")))
    assert sorted(adapter_weights(model)) == [
        "model.embed_tokens.lora_a",
        "model.embed_tokens.lora_b",
        "model.layers.2.mlp.gate_proj.lora_a",
        "model.layers.2.mlp.gate_proj.lora_b",
    ]
    random_adapters(model)
    adapted = logits(model)
    fuse_model(model)
    close(logits(model), adapted, plain, 1e-5)


def test_adapting_twice_is_an_error(model):
    adapt(model)
    with pytest.raises(InputError, match="adapted already"):
        adapt(model)


def save(model, directory):
    storage.write_directory(
        directory,
        {
            "adapters.safetensors": storage.arrays_writer(adapter_weights(model)),
            "adapter_config.json": storage.json_writer(adapter_config(model)),
        },
    )


@pytest.mark.parametrize("module_args", [(llama, None), (mixtral, MIXTRAL)], ids=["llama", "mixtral"])
def test_saved_adapters_load_in_mlx_lm_and_here(tmp_path, module_args):
    module, args = module_args
    model = build_model(module=module, args=args)
    adapt(model, NALoRAConfig(num_layers=2, rank=3, scale=4.0, beta=0.8, branches=("gate", "up")))
    random_adapters(model)
    save(model, tmp_path / "a")
    want = logits(model)
    theirs = load_adapters(build_model(module=module, args=args), str(tmp_path / "a"))
    assert relative(logits(theirs), want) < 1e-6
    ours = build_model(module=module, args=args)
    report = load_adapter(ours, tmp_path / "a")
    np.testing.assert_array_equal(logits(ours), want)
    assert report.config.beta == 0.8
    assert report.config.branches == ("gate", "up")
    leaves = {name.rsplit(".", 1)[1] for name in mx.load(str(tmp_path / "a" / "adapters.safetensors"))}
    assert leaves == {"lora_a", "lora_b"}


def test_an_adapter_of_mlx_lm_loads_here(tmp_path):
    theirs = build_model()
    theirs.freeze()
    linear_to_lora_layers(theirs, 2, {"rank": 4, "scale": 20.0, "dropout": 0.0})
    random_adapters(theirs)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}, "data": "x"}
        )
    )
    mx.save_safetensors(
        str(tmp_path / "adapters.safetensors"), dict(tree_flatten(theirs.trainable_parameters()))
    )
    ours = build_model()
    load_adapter(ours, tmp_path)
    assert relative(logits(ours), logits(theirs)) < 1e-6


def test_an_expert_adapter_of_mlx_lm_loads_with_its_routers(tmp_path):
    """Without keys mlx-lm adapts routers too, which shows only in the names of the saved arrays."""
    theirs = build_model(module=mixtral, args=MIXTRAL)
    theirs.freeze()
    linear_to_lora_layers(theirs, 2, {"rank": 4, "scale": 20.0, "dropout": 0.0})
    random_adapters(theirs)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}})
    )
    mx.save_safetensors(
        str(tmp_path / "adapters.safetensors"), dict(tree_flatten(theirs.trainable_parameters()))
    )
    ours = build_model(module=mixtral, args=MIXTRAL)
    load_adapter(ours, tmp_path)
    assert "model.layers.2.block_sparse_moe.gate.lora_a" in adapter_weights(ours)
    assert relative(logits(ours), logits(theirs)) < 1e-5


@pytest.mark.parametrize("size", [1e-5, 1e-4])
def test_float16_gradients_do_not_underflow(size):
    """Gradients of lora_a, while lora_b is tiny and each token has little weight, are as accurate as mlx-lm's."""
    errors = {}
    weights = None
    for kind in ("float32", "ours", "mlx_lm"):
        model = build_model(dtype=mx.float32 if kind == "float32" else mx.float16)
        if kind == "mlx_lm":
            model.freeze()
            keys = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
            linear_to_lora_layers(model, 3, {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": keys})
        else:
            adapt(
                model,
                NALoRAConfig(num_layers=-1, rank=4, keys=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
            )
            random_adapters(model, size=size)
        weights = weights or list(adapter_weights(model).items())
        model.load_weights(weights, strict=False)

        def loss(model):
            losses = nn.losses.cross_entropy(model(TOKENS).astype(mx.float32), mx.roll(TOKENS, -1, axis=1))
            return losses.sum() / 4096

        found = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
        errors[kind] = {k: np.array(v.astype(mx.float32)) for k, v in found.items() if k.endswith("lora_a")}
    want = errors.pop("float32")
    size_of = {k: np.linalg.norm(v) for k, v in want.items()}
    mean = {
        kind: np.mean([np.linalg.norm(g[k] - want[k]) / size_of[k] for k in want])
        for kind, g in errors.items()
    }
    assert mean["ours"] < 1.2 * mean["mlx_lm"] + 1e-3


def test_dora_uses_mlx_lms_layers(model):
    report = adapt_dora(model, NALoRAConfig(num_layers=1))
    assert gated_mlps(model) == []
    assert adapter_config(model)["fine_tune_type"] == "dora"
    assert adapt_result(model).plain == report.plain
    random_adapters(model)
    adapted = logits(model)
    fuse_model(model)
    assert relative(logits(model), adapted) < 1e-5


def test_all_weights_that_do_not_fit_are_listed(model, tmp_path):
    adapt(model, NALoRAConfig(rank=4, num_layers=1))
    weights = adapter_weights(model)
    name = next(iter(weights))
    path = tmp_path / "a.safetensors"
    broken = {k: v for k, v in weights.items() if k != name} | {"nothing.lora_a": mx.ones(1)}
    other = next(iter(broken))
    broken[other] = mx.ones((2, 2))
    mx.save_safetensors(str(path), broken)
    with pytest.raises(InputError) as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert f"{name} is missing" in message
    assert f"{other} is (2, 2)" in message
    assert "nothing.lora_a is not a trainable array" in message
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="not a valid safetensors"):
        load_weights(model, path)


def test_na_lora_needs_an_adapter_on_one_of_its_branches(model):
    report = adapt(model, NALoRAConfig(num_layers=1, keys=("mlp.up_proj",)))
    assert not isinstance(model.model.layers[2].mlp, GatedMLP)
    assert "its gate projection has no adapter" in report.skipped[0].reason
    other = build_model()
    adapt(other, NALoRAConfig(num_layers=1, keys=("mlp.up_proj",), branches=("gate", "up")))
    factors = other.model.layers[2].mlp.step_factors(mx.ones(48))
    assert list(factors) == ["model.layers.2.mlp.up_proj.lora_b"]


@pytest.mark.parametrize(
    ("bits", "dequantize", "error"),
    [(None, True, 0.12), (8, False, 0.12), (None, False, 0.17)],  # the last is rounded to 4 bits twice
)
def test_merging_into_experts_with_one_scale_per_expert(bits, dequantize, error):
    mx.random.seed(0)
    dense = SwitchLinear(64, 16, 3, bias=False)
    dense.weight = dense.weight * mx.array([1.0, 30.0, 0.003])[:, None, None]
    adapter = LoRASwitchLinear(dense.to_quantized(16, 4, "nvfp4", global_scale=True), 2, 2.0, Dropout(0.0, 0))
    sizes = mx.array([0.1, 3.0, 0.0003])[:, None, None]
    adapter.lora_b = sizes * mx.random.normal(adapter.lora_b.shape)
    wanted = dense.weight + 2.0 * adapter.lora_b @ adapter.lora_a
    fused = dequantized(fuse_module(adapter, bits, dequantize))
    for given, want in zip(fused, wanted, strict=True):
        assert mx.linalg.norm(given - want) < error * mx.linalg.norm(want)
