"""A rank beyond the dimensions of the layers: refused before anything is allocated, or a notice."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from nalora_mlx.adapters.attach import adapt, adapt_dora
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError
from tests.conftest import build_model, llama_args


@pytest.mark.parametrize("attach", [adapt, adapt_dora])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_rank_above_every_layer_is_refused_before_anything_is_allocated(attach, quantized):
    model = build_model()
    if quantized:
        nn.quantize(
            model, 32, 4, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] == 32
        )
    before = dict(model.named_modules())
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    message = (
        r"rank is 999999999, larger than .* model\.embed_tokens has 64 x 32 weights, so a rank above 32 adds"
    )
    with pytest.raises(InputError, match=message):
        attach(model, NALoRAConfig(rank=999_999_999, num_layers=-1))
    assert mx.get_peak_memory() - start < 10**6
    assert dict(model.named_modules()) == before


def test_the_largest_rank_and_small_projections_train():
    # Keys and values have 8 outputs each.
    model = build_model(args=llama_args(num_key_value_heads=1))
    result = adapt(model, NALoRAConfig(rank=32, num_layers=-1))
    assert result.notices == [
        "rank is 32, larger than the smaller dimension of 6 of 21 adapted modules, such as "
        "model.layers.0.self_attn.v_proj (8 x 32); there, a rank above 8 adds nothing"
    ]
    assert model.layers[0].self_attn.k_proj.lora_b.shape == (32, 8)  # as in mlx-lm
    assert adapt(build_model(), NALoRAConfig(rank=16, num_layers=-1)).notices == []


def test_a_small_projection_alone_may_have_the_rank_of_its_model():
    """Only its own size would make a rank of 16 a mistake; an adapter of it is never large."""
    model = build_model(args=llama_args(num_key_value_heads=1))
    result = adapt(
        model,
        NALoRAConfig(rank=16, num_layers=-1, keys=("self_attn.k_proj",), selection_limit=0),
    )
    assert len(result.notices) == 1
    assert "larger than the smaller dimension of 3 of 3 adapted modules" in result.notices[0]
