"""Merging adapters into the weights of a model, and what the merged layers look like in its config."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from nalora_mlx.adapters.attach import adapt_result, gated_mlps, replace_module
from nalora_mlx.adapters.gated_mlps import GatedMLP
from nalora_mlx.adapters.layers import QUANTIZED, dequantized, quantized_like
from nalora_mlx.core.errors import InputError, listed


def fuse_model(model: nn.Module, bits: int | None = 8, dequantize: bool = False) -> dict[str, nn.Module]:
    """Merge all adapters into the weights, in place. The module tree becomes the base model's again.

    Args:
        model: a model adapted by `adapt`, `adapt_dora` or mlx-lm.
        bits: bits of the adapted layers of a quantized model. 8 bits keep the update; 4 mostly lose it. None keeps
            the bits that each layer has. Layers without an adapter are not touched.
        dequantize: leave adapted layers dense instead.

    Returns:
        The merged layers by path.
    """
    merged = {path for path, module in model.named_modules() if "lora_a" in module}
    for gated in gated_mlps(model):
        replace_module(model, gated.path, _fuse_gated(gated, bits, dequantize))
    for path, module in list(model.named_modules()):
        if (fused := fuse_module(module, bits, dequantize)) is not module:
            replace_module(model, path, fused)
    if adapt_result(model) is not None:
        del model.adapt_result
    return {path: module for path, module in model.named_modules() if path in merged}


def _fuse_gated(gated: GatedMLP, bits: int | None, dequantize: bool) -> nn.Module:
    """Return the original module of a gated MLP, with every adapter merged into its projection."""
    for name in gated.layout.projections:
        gated.original[name] = fuse_module(gated[name], bits, dequantize)
    return gated.original


def fuse_module(module: nn.Module, bits: int | None, dequantize: bool) -> nn.Module:
    """Merge one adapter into its base layer; return a module without an adapter unchanged.

    Args:
        module: any module.
        bits: bits of the merged layer if the base is quantized; None for the base's own.
        dequantize: leave a quantized base dense instead.
    """
    if "lora_a" not in module or not hasattr(module, "fuse"):
        return module
    base = base_layer(module)
    dense = module.fuse(dequantize=True)
    if dequantize or not isinstance(base, QUANTIZED):
        return dense
    if bits is None:
        return quantized_like(base, dense)
    # Affine mode is the only one with all bit widths, and at 8 bits it is finer than mxfp8. Its groups have 32, 64
    # or 128 elements.
    return dense.to_quantized(base.group_size if base.mode == "affine" else 32, bits, "affine")


def base_layer(module: nn.Module) -> nn.Module | None:
    """Return the frozen layer inside an adapter of ours or mlx-lm's; None for any other module."""
    return module.get("linear", module.get("embedding")) if "lora_a" in module else None


def dequantize_scaled_experts(model: nn.Module) -> None:
    """Make experts dense, in place, if they have one scale per expert; mlx-lm's `dequantize_model` skips these."""
    dense = []
    for path, old in model.named_modules():
        if isinstance(old, QuantizedSwitchLinear) and old.global_scale is not None:
            new = SwitchLinear(1, 1, 1, bias=False)
            new.weight = dequantized(old)
            if "bias" in old:
                new.bias = old.bias
            dense.append((path, new))
    model.update_modules(tree_unflatten(dense))


def check_bits(model: nn.Module, bits: int | None) -> None:
    """Raise InputError if a quantized, adapted layer cannot be merged at these bits; None means its own bits."""
    flag = f"--bits {'same' if bits is None else bits}"
    for path, module in model.named_modules():
        base = base_layer(module)
        if base is None or "scales" not in base:
            continue
        if base.get("global_scale") is not None:
            raise InputError(f"{flag}: {path} has one scale per expert; give --dequantize")
        columns = base.scales.shape[-1] * base.group_size
        if bits is not None and base.mode != "affine" and columns % 32:
            raise InputError(
                f"{flag}: {path} has rows of {columns} elements, which is not a multiple of the group size 32; "
                "give --bits same or --dequantize"
            )


def merged_quantization(
    quantization: Mapping[str, Any] | None, model: nn.Module, merged: Mapping[str, nn.Module]
) -> dict[str, Any] | None:
    """Return what a merged model's config must say under "quantization", so that mlx-lm can load the model.

    Args:
        quantization: what the base's config says there; None if nothing, as in formats that mlx-lm converts (AWQ).
        model: the merged model.
        merged: the merged layers by path.

    Returns:
        The entry, with the bits of merged layers by path where they differ; None if no layer is quantized.
    """
    found = {path: _bits(module) for path, module in model.named_modules() if "scales" in module}
    if not found:
        return None
    if quantization is None:
        default = max(found.values(), key=list(found.values()).count)
        return default | {path: bits for path, bits in found.items() if bits != default}
    default = {"mode": "affine"} | {
        name: quantization[name] for name in ("group_size", "bits", "mode") if name in quantization
    }
    said = {path: dict(bits) for path, bits in quantization.items() if isinstance(bits, Mapping)}
    return dict(quantization) | {
        path: found[path]
        for path in merged
        if path in found and {"mode": "affine"} | said.get(path, default) != found[path]
    }


def _bits(layer: nn.Module) -> dict[str, Any]:
    """Return how a layer is quantized, as configs say it."""
    special = {"global_scale": True} if layer.get("global_scale") is not None else {}
    return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode} | special


def check_finite_layers(layers: Mapping[str, nn.Module], problem: str) -> None:
    """Raise InputError if weights are NaN or infinite.

    Args:
        layers: what to check, by path; the path of a whole model is empty.
        problem: the message, which the names of the arrays follow.
    """
    wrong = []
    for path, layer in layers.items():
        arrays = tree_flatten(layer.parameters())
        if isinstance(layer, QUANTIZED) and layer.mode != "affine":
            arrays.append(("weight", dequantized(layer)))  # its scales are bytes, some of which mean NaN
        for name, array in arrays:
            if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
                wrong.append(f"{path}.{name}".lstrip("."))
    if wrong:
        raise InputError(f"{problem}: {listed(wrong, ', ')}")
