"""How adapters come into a model (`adapt`), are saved and loaded, and are merged into its weights (`fuse_model`)."""

import mlx.nn as nn

from nalora_mlx.adapters.attach import adapt_result, gated_mlps, replace_module
from nalora_mlx.adapters.gated_mlps import GatedMLP
from nalora_mlx.adapters.layers import QUANTIZED, quantized_like


def fuse_model(model: nn.Module, bits: int | None = 8, dequantize: bool = False) -> dict[str, nn.Module]:
    """Merge all adapters into the weights, in place; the module tree is the base model's again.

    Args:
        model: an adapted model, by `adapt` or by mlx-lm.
        bits: what a quantized, adapted layer becomes: 8 keeps the update, 4 mostly loses it; None for the bits that
            it has. Layers without an adapter keep their bits untouched.
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
    """Return the original module of a gated MLP with every adapter merged into its projection."""
    for name in gated.layout.projections:
        gated.original[name] = fuse_module(gated[name], bits, dequantize)
    return gated.original


def fuse_module(module: nn.Module, bits: int | None, dequantize: bool) -> nn.Module:
    """Merge one adapter into its base; a module without an adapter comes back as it is.

    Args:
        module: any module.
        bits: what a quantized base becomes; None for the bits that it has.
        dequantize: leave a quantized base dense instead.
    """
    if "lora_a" not in module or not hasattr(module, "fuse"):
        return module
    base = module.get("linear", module.get("embedding"))
    dense = module.fuse(dequantize=True)
    if dequantize or not isinstance(base, QUANTIZED):
        return dense
    if bits is None:
        return quantized_like(base, dense)
    # Affine, because only it knows all widths and because eight bits of it are finer than those of mxfp8; its
    # groups are of 32, 64 or 128.
    return dense.to_quantized(base.group_size if base.mode == "affine" else 32, bits, "affine")
