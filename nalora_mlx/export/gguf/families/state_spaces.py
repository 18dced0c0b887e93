"""Mamba models and their hybrids with attention in GGUF, one table row per model type."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import Architecture, Check, Metadata
from nalora_mlx.export.gguf.placement import Placement, Placements, layer_and_rest, negative_exp, renamed

UNLIMITED = (0.0, float("inf"))
WIDE = (0.001, 100.0)  # mlx-lm's default
BIASES = frozenset({"ssm_conv1d", "ssm_dt"})


@dataclass(frozen=True)
class StateSpace:
    """The state space layers of a model."""

    kernel: int  # width of the convolution
    inner: int  # channels
    state: int  # size of a channel's state
    rank: int  # Mamba: rank of the step sizes; Mamba 2: number of heads
    groups: int = 0  # Mamba 2: groups of heads that share B and C
    conv_bias: bool = True
    limit: tuple[float, float] = UNLIMITED  # of the step sizes, in mlx-lm
    # Mamba 2: whether mlx-lm normalizes each group on its own, as llama.cpp does.
    has_grouped_norm: bool = True

    @property
    def channels(self) -> int:
        """Number of channels of the convolution."""
        return self.inner + 2 * self.groups * self.state

    def write(self, writer: Any) -> None:
        """Write the sizes."""
        writer.add_ssm_conv_kernel(self.kernel)
        writer.add_ssm_inner_size(self.inner)
        writer.add_ssm_state_size(self.state)
        writer.add_ssm_time_step_rank(self.rank)
        writer.add_ssm_group_count(self.groups)

    def place(self, block: str, name: str) -> Placement | None:
        """Return the tensor made from the parameter `name` of a state space layer; None if it is unknown."""
        heads = (self.rank, 1) if self.groups else None
        if name == "conv1d.weight":
            shape = (self.channels, self.kernel)
            return Placement(f"{block}.ssm_conv1d.weight", shape=shape, full_precision=True)
        if name == "A_log":
            return Placement(f"{block}.ssm_a", values=negative_exp, shape=heads, full_precision=True)
        if name == "D":
            return Placement(f"{block}.ssm_d", shape=heads, full_precision=True)
        if name == "norm.weight" and self.groups:
            shape = (self.groups, self.inner // self.groups)
            return Placement(f"{block}.ssm_norm.weight", shape=shape, full_precision=True)
        other = {
            "conv1d.bias": "ssm_conv1d.bias",
            "dt_bias": "ssm_dt.bias",
            "dt_proj.bias": "ssm_dt.bias",
            "dt_proj.weight": "ssm_dt.weight",
            "in_proj.weight": "ssm_in.weight",
            "x_proj.weight": "ssm_x.weight",
            "out_proj.weight": "ssm_out.weight",
        }.get(name)
        return Placement(f"{block}.{other}") if other else None

    def problems(self) -> Iterator[str]:
        """Yield what llama.cpp would compute differently."""
        low, high = self.limit
        if low > WIDE[0] or high < WIDE[1]:
            yield f"time_step_limit is [{low:g}, {high:g}]: llama.cpp does not limit step sizes"
        if self.groups > 1 and not self.has_grouped_norm:
            yield f"{self.groups} groups of heads: llama.cpp normalizes each, mlx-lm all together"

    def notes(self) -> Iterator[str]:
        """Yield differences that are too small to refuse the model."""
        if UNLIMITED[0] < self.limit[0] <= WIDE[0]:
            yield f"mlx-lm keeps Mamba's step sizes above {self.limit[0]:g}, llama.cpp does not"


def state_space_row(
    name: str,
    describe: Callable[[Any], StateSpace],
    module: str,
    names: dict[str, str],
    is_recurrent: Callable[[Any], list[bool]],
    *,
    metadata: Metadata = lambda writer, args, config: None,
    placements: Placements = lambda args, path: None,
    checks: Check = lambda args: iter(()),
    notes: Check = lambda args: iter(()),
    **fields: Any,
) -> Architecture:
    """Return a table row.

    Args:
        name: general.architecture.
        describe: returns the model's state space layers.
        module: their name in a layer.
        names: those of the other parameters, for `renamed`.
        is_recurrent: returns for each layer whether it has a state space.
        metadata: writes keys besides those of the state space.
        placements: tensors that need more than a name.
        checks: yields problems besides those of the state space.
        notes: likewise notes.
        fields: other fields of the row.
    """

    rename = renamed(names)

    def write(writer: Any, args: Any, config: dict[str, Any]) -> None:
        if any(is_recurrent(args)):
            describe(args).write(writer)
        metadata(writer, args, config)

    def place(args: Any, path: str) -> list[Placement] | None:
        found = placements(args, path)
        if found is not None:
            return found
        layer, rest = layer_and_rest(path)
        if rest.startswith(f"{module}.") and is_recurrent(args)[layer]:
            placement = describe(args).place(f"blk.{layer}", rest.removeprefix(f"{module}."))
            if placement:
                return [placement]
        return rename(args, path)

    def zeros(args: Any) -> dict[str, np.ndarray]:
        """Return the biases of convolutions that llama.cpp needs and the model lacks."""
        space = describe(args)
        if space.conv_bias:
            return {}
        layers = [layer for layer, recurrent in enumerate(is_recurrent(args)) if recurrent]
        return {f"blk.{i}.ssm_conv1d.bias": np.zeros(space.channels, np.float32) for i in layers}

    def problems(args: Any) -> Iterator[str]:
        yield from describe(args).problems()
        yield from checks(args)

    def all_notes(args: Any) -> Iterator[str]:
        yield from describe(args).notes()
        yield from notes(args)

    return Architecture(
        name,
        biases=fields.pop("biases", frozenset()) | BIASES,
        placements=place,
        extra_metadata=write,
        extra_tensors=zeros,
        extra_checks=problems,
        extra_notes=all_notes,
        **fields,
    )


def all_layers(args: Any) -> list[bool]:
    """Return that each layer has a state space."""
    return [True] * args.num_hidden_layers


# --- Mamba -------------------------------------------------------------------------------------------

_MAMBA = {
    "backbone.embeddings": "token_embd",
    "backbone.norm_f": "output_norm",
    "norm": "attn_norm",
}


def _mamba(args: Any) -> StateSpace:
    rank = int(args.time_step_rank)
    return StateSpace(
        args.conv_kernel, args.intermediate_size, args.state_size, rank, conv_bias=args.use_conv_bias
    )


def _mamba_sizes(args: Any) -> dict[str, Any]:
    unused = dict.fromkeys(("head_count_kv", "key_length", "value_length", "rope_theta", "rope_dims"))
    # mlx-lm's norms have this epsilon, whatever the config says. A state has no context length.
    own = {"rms_norm_eps": 1e-5, "context_length": 1 << 20}
    return unused | own | {"head_count": 0, "feed_forward_length": 0}


def _mamba_metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_ssm_dt_b_c_rms(args.use_bcdt_rms)


def _mamba_checks(args: Any) -> Iterator[str]:
    if args.intermediate_size != 2 * args.hidden_size:
        yield "intermediate_size is not twice hidden_size: llama.cpp's mamba needs that"
    if args.use_bcdt_rms and args.mixer_rms_eps > 1e-5:
        yield f"mixer_rms_eps is {args.mixer_rms_eps:g}: llama.cpp uses one epsilon for all norms, 1e-05"


def _mamba_notes(args: Any) -> Iterator[str]:
    if args.use_bcdt_rms and args.mixer_rms_eps < 1e-5:
        yield f"llama.cpp uses the epsilon 1e-05 in all norms, mlx-lm {args.mixer_rms_eps:g} in those of B, C and dt"


def _mamba2(args: Any) -> StateSpace:
    return StateSpace(
        args.conv_kernel,
        args.num_heads * args.head_dim,
        args.ssm_state_size,
        args.num_heads,
        args.n_groups,
        args.use_conv_bias,
        tuple(args.time_step_limit),
        has_grouped_norm=False,
    )


def _mamba2_checks(args: Any) -> Iterator[str]:
    if args.num_heads * args.head_dim != 2 * args.hidden_size:
        yield "num_heads * head_dim is not twice hidden_size: llama.cpp's mamba2 needs that"
    if args.layer_norm_epsilon != 1e-5:
        yield f"layer_norm_epsilon is {args.layer_norm_epsilon:g}: mlx-lm uses 1e-05 in some norms, llama.cpp in none"


_MAMBA_ROW = state_space_row(
    "mamba",
    _mamba,
    "mixer",
    _MAMBA,
    all_layers,
    metadata=_mamba_metadata,
    checks=_mamba_checks,
    notes=_mamba_notes,
    sizes=_mamba_sizes,
)

STATE_SPACES: dict[str, Architecture] = {
    "mamba": _MAMBA_ROW,
    "falcon_mamba": _MAMBA_ROW,
    "mamba2": state_space_row(
        "mamba2", _mamba2, "mixer", _MAMBA, all_layers, checks=_mamba2_checks, sizes=_mamba_sizes
    ),
}
