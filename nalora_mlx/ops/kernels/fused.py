"""The Metal and CUDA kernels of the gated residual: how they are built and called.

Both backends run the same kernel bodies, metal/forward.metal and metal/backward.metal, which document their inputs. A
thread computes four neighbouring channels of a tile of rows, and keeps its columns of B in registers.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple

import mlx.core as mx

from nalora_mlx.ops.activations import Activation
from nalora_mlx.ops.kernels.low_rank import LowRank

TILE = 64  # rows per thread; B is read once per tile
AHEAD = 2  # rows whose loads a thread has in flight; more hide more latency, but take registers
CHANNELS = 4  # neighbouring channels per thread: one vector load
THREADS = 64  # per threadgroup, along the channels
MAX_RANK = 16  # at higher ranks the product inside the kernel would be compute-bound, see docs/kernels.md
MIN_SIZE = 8  # elements per input; MLX passes smaller arrays to a Metal kernel in another address space

STATISTICS = (None, "derivative", "sensitivity")
# How gate and up projections are stored: as two arrays [N, F], or as one array [N, 2 F] from one projection.
GateUpLayout = Literal["separate", "gate first", "up first"]
GATE_UP_LAYOUTS: tuple[GateUpLayout, ...] = ("separate", "gate first", "up first")
INPUTS = ("g0", "u0", "z0", "ag", "au", "bg", "bu", "w", "p", "tiles")


@dataclass(frozen=True)
class Variant:
    """Everything that is fixed when a kernel is compiled, except dtypes and rank.

    Attributes:
        activation: a row of the activation table, with `kernel` set.
        gate_up_layout: one of GATE_UP_LAYOUTS.
        statistic: one of STATISTICS.
        boundaries: of the partition, at most two.
        diagnose: whether to compute the sums for selection misalignment.
        experts: number of experts, 0 for a dense MLP.
        precise: whether the reference computes in float32 or rounds after every operation. Kernels always compute in
            float32, so variants that differ in this only are equal.
    """

    activation: Activation
    gate_up_layout: GateUpLayout = "separate"
    statistic: str | None = None
    boundaries: tuple[float, ...] = ()
    diagnose: bool = False
    experts: int = 0
    precise: bool = field(default=True, compare=False)

    @property
    def without_statistics(self) -> "Variant":
        """The same variant without statistics."""
        return replace(self, statistic=None, boundaries=(), diagnose=False)

    @property
    def num_sums(self) -> int:
        """Number of sums per channel that the forward computes."""
        return 0 if self.statistic is None else 1 + len(self.boundaries) + 2 * self.diagnose

    @property
    def is_joint(self) -> bool:
        """Whether one projection computes both gate and up."""
        return self.gate_up_layout != "separate"

    def features(self, width: int) -> int:
        """Return F, given the width of a projection's output, F or 2 F."""
        return width // 2 if self.is_joint else width

    def split(self, outputs: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
        """Return gate and up, [..., F] each, from the outputs of the projections."""
        if not self.is_joint:
            return outputs[0], outputs[1]
        first, second = mx.split(outputs[0], 2, axis=-1)
        return (first, second) if self.gate_up_layout == "gate first" else (second, first)


class Operands(NamedTuple):
    """The arrays of one kernel call; see metal/forward.metal.

    Shapes: N rows, F channels, rank R, E experts, T tiles. Tuples hold one array for gate and one for up, or a single
    array where one projection computes both; its F is then 2 F.
    """

    bases: tuple[mx.array, ...]  # [N, F], outputs of the frozen projections
    lows: tuple[
        mx.array, ...
    ] = ()  # [N, R], x A; empty if the low-rank product is not computed in the kernel
    bs: tuple[mx.array, ...] = ()  # [R, F], or [E, F, R] with experts
    scales: tuple[float, float] = (0.0, 0.0)  # of the two low-rank products
    z0: mx.array | None = None  # [N, F], gate without the update, if `bases` include it and `diagnose` is set
    weights: mx.array | None = None  # [N], float32
    tiles: mx.array | None = None  # [T, 3], int32, see `expert_tiles`


def forward(backend: str, variant: Variant, operands: Operands) -> tuple[mx.array, mx.array]:
    """Run the forward kernel.

    Returns:
        h [N, F] in the dtype of the bases, and the sums per tile of rows [S, T, F], float32.
    """
    rows, features = _rows_and_features(variant, operands)
    tiles = _num_tiles(operands)
    shapes = [(rows, features), (variant.num_sums, tiles, features) if variant.num_sums else (1, 1, 1)]
    dtypes = [operands.bases[0].dtype, mx.float32]
    h, sums = _call(backend, "forward", variant, operands, (), shapes, dtypes)
    return h, sums


def backward(backend: str, variant: Variant, operands: Operands, dh: mx.array) -> tuple[mx.array, ...]:
    """Run the backward kernel.

    Args:
        backend: "metal" or "cuda".
        variant: the forward's variant.
        operands: the forward's operands.
        dh: [N, F], the gradient of h.

    Returns:
        The gradients of `operands.bases`, in their shapes and dtype.
    """
    rows, features = _rows_and_features(variant, operands)
    dtype = operands.bases[0].dtype
    if not variant.is_joint:
        (d,) = _call(backend, "backward", variant, operands, (dh,), [(2, rows, features)], [dtype])
        # Views; d[0] would be a copy.
        return tuple(half.reshape(rows, features) for half in mx.split(d, 2))
    return tuple(_call(backend, "backward", variant, operands, (dh,), [(rows, 2 * features)], [dtype]))


def fits_in_kernel(projections: tuple[LowRank, ...]) -> bool:
    """Return whether the kernel can compute the low-rank products: one small rank, and no tiny arrays."""
    ranks = {0 if p.low is None else p.low.shape[-1] for p in projections}
    if len(ranks) > 1 or not 0 < max(ranks) <= MAX_RANK:
        return False
    return all(a.size >= MIN_SIZE for p in projections for a in p.lora_arrays)


def expert_tiles(experts: mx.array, count: int) -> mx.array:
    """Split rows sorted by expert into tiles with one expert each.

    1. Count the rows of each expert, and the tiles of at most TILE rows that they need.
    2. Find the expert of each tile from the cumulative number of tiles.
    3. Find the first row of each tile from the expert's first row and the tile's position among the expert's tiles.

    Args:
        experts: [N], the expert of each row, sorted.
        count: E.

    Returns:
        [T, 3] int32 with T = ceil(N / TILE) + E: expert, first row, last row + 1. Some tiles are empty.
    """
    rows = mx.sum(experts[None, :] == mx.arange(count)[:, None], axis=1).astype(mx.int32)  # [E]
    tiles = (rows + TILE - 1) // TILE  # [E]
    tile_ends = mx.cumsum(tiles)  # [E], tiles up to and including each expert
    total = -(-experts.size // TILE) + count
    tile = mx.arange(total, dtype=mx.int32)
    expert = mx.minimum(mx.sum(tile[:, None] >= tile_ends[None, :], axis=1), count - 1).astype(
        mx.int32
    )  # [T]
    end = mx.cumsum(rows)[expert]  # [T], the expert's last row + 1
    start = end - rows[expert] + (tile - (tile_ends - tiles)[expert]) * TILE
    return mx.stack([expert, mx.minimum(start, end), mx.minimum(start + TILE, end)], axis=1)


def _rows_and_features(variant: Variant, operands: Operands) -> tuple[int, int]:
    rows, width = operands.bases[0].shape
    return rows, variant.features(width)


def _num_tiles(operands: Operands) -> int:
    if operands.tiles is not None:
        return operands.tiles.shape[0]
    return -(-operands.bases[0].shape[0] // TILE)


def _call(
    backend: str,
    direction: str,
    variant: Variant,
    operands: Operands,
    extra_inputs: tuple[mx.array, ...],
    output_shapes: list[tuple[int, ...]],
    output_dtypes: list[mx.Dtype],
) -> list[mx.array]:
    """Call the "forward" or "backward" kernel. Absent operands are replaced by small arrays that it does not read."""
    rank = operands.lows[0].shape[-1] if operands.lows else 0
    dtype = operands.bases[0].dtype
    absent = mx.zeros(MIN_SIZE)
    constants = (*operands.scales, *(*variant.boundaries, 0.0, 0.0)[:2], *variant.activation.constants)
    p = mx.array((*constants, *(0.0,) * (8 - len(constants))), dtype=mx.float32)
    gate_and_up = (0, -1)  # the same array twice where one projection computes both
    inputs = [operands.bases[i] for i in gate_and_up]
    inputs.append(absent.astype(dtype) if operands.z0 is None else operands.z0)
    for arrays in (operands.lows, operands.bs):
        inputs += [arrays[i] if arrays else absent for i in gate_and_up]
    inputs.append(absent if operands.weights is None else operands.weights)
    inputs.append(p)
    inputs.append(absent.astype(mx.int32) if operands.tiles is None else operands.tiles)
    template: list[tuple[str, Any]] = [
        ("T", dtype),
        ("L", operands.lows[0].dtype if operands.lows else mx.float32),
        ("RANK", rank),
        ("TILE", TILE),
        ("AHEAD", AHEAD),
        ("HALVES", GATE_UP_LAYOUTS.index(variant.gate_up_layout)),
        ("EXPERTS", variant.experts > 0),
    ]
    if direction == "forward":
        template += [
            ("STATISTIC", STATISTICS.index(variant.statistic)),
            ("BOUNDARIES", len(variant.boundaries)),
            ("CLOSED", variant.activation.left_closed),
            ("DIAGNOSE", variant.diagnose),
        ]
    assert variant.activation.kernel is not None
    _, features = _rows_and_features(variant, operands)
    return _kernel(backend, direction, variant.activation.kernel)(
        inputs=[*inputs, *extra_inputs],
        template=template,
        grid=(-(-features // CHANNELS), _num_tiles(operands), 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=output_shapes,
        output_dtypes=output_dtypes,
    )


@cache
def source(path: str) -> str:
    """Return the text of a kernel source file, given its path in this package."""
    return resources.files(__package__).joinpath(path).read_text(encoding="utf-8")


def _kernel(backend: str, direction: str, activation: str) -> Any:
    header = source("metal/common.metal") + f"\ntypedef {activation} GATE;\n"
    body = source(f"metal/{direction}.metal")
    if backend == "cuda":  # CUDA has no address spaces
        header, body = (text.replace("device ", "") for text in (header, body))
        header = source("cuda/prelude.cuh") + header
    return _build_kernel(backend, direction, activation, header, body)


@cache
def _build_kernel(backend: str, direction: str, activation: str, header: str, body: str) -> Any:
    """Return MLX's kernel object. MLX compiles it on the first call with given dtypes and constants."""
    make: Any = mx.fast.cuda_kernel if backend == "cuda" else mx.fast.metal_kernel
    return make(
        name=f"nalora_{direction}_{activation}",
        input_names=[*INPUTS, *(["dh"] if direction == "backward" else [])],
        output_names=["h", "sums"] if direction == "forward" else ["d"],
        source=body,
        header=header,
    )
