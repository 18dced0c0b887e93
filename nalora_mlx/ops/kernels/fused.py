"""The Metal and CUDA kernels of the gated residual: what they are built from, and how they are called.

Both backends run the same bodies, metal/forward.metal and metal/backward.metal, which say what each input is. A thread
works on four neighbouring channels of a tile of rows and keeps its columns of B in registers.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

import mlx.core as mx

from nalora_mlx.ops.activations import Activation
from nalora_mlx.ops.kernels.low_rank import LowRank

TILE = 64  # rows that a thread works through: B is read once per tile
CHANNELS = 4  # neighbouring channels per thread: one vector load
THREADS = 64  # per threadgroup, along the channels
MAX_RANK = 16  # above this the product inside the kernel is bound by arithmetic, see docs/kernels.md
SMALLEST = 8  # elements; MLX hands smaller arrays to a Metal kernel in another address space

STATISTICS = (None, "derivative", "sensitivity")
GATE_UP_LAYOUTS = ("separate", "gate first", "up first")  # how gate and up stand in the arrays they come in
INPUTS = ("g0", "u0", "z0", "ag", "au", "bg", "bu", "w", "p", "tiles")


@dataclass(frozen=True)
class Variant:
    """Which kernel: everything that is fixed when it is compiled, but for dtypes and rank.

    Attributes:
        activation: a row of the table, with `kernel` set.
        gate_up_layout: one of GATE_UP_LAYOUTS.
        statistic: one of STATISTICS.
        boundaries: of the partition, at most two.
        diagnose: whether to sum what selection misalignment needs.
        experts: number of experts, 0 for a dense MLP.
        precise: whether the reference computes in float32 or rounds after every operation; kernels never round.
    """

    activation: Activation
    gate_up_layout: str = "separate"
    statistic: str | None = None
    boundaries: tuple[float, ...] = ()
    diagnose: bool = False
    experts: int = 0
    precise: bool = field(default=True, compare=False)

    @property
    def without_statistics(self) -> "Variant":
        """The same without statistics."""
        return replace(self, statistic=None, boundaries=(), diagnose=False)

    @property
    def sums(self) -> int:
        """How many sums per channel the forward makes."""
        return 0 if self.statistic is None else 1 + len(self.boundaries) + 2 * self.diagnose


@dataclass(frozen=True)
class Operands:
    """The arrays of one call; see metal/forward.metal. Absent ones are None.

    Attributes:
        bases: g0 and u0 [N, F] each, or the one array [N, 2F] that holds both.
        lows: ag and au [N, R], or the one that makes both; none without a product in the kernel.
        bs: Bg and Bu [R, F], or the one [R, 2F]; with experts [E, F, R] or [E, 2F, R].
        scales: of the two products.
        z0: gate without the update, where `bases` have it in them and it is to be diagnosed.
        weights: [N] float32.
        tiles: [T, 3] int32, see `expert_tiles`.
    """

    bases: tuple[mx.array, ...]
    lows: tuple[mx.array, ...] = ()
    bs: tuple[mx.array, ...] = ()
    scales: tuple[float, float] = (0.0, 0.0)
    z0: mx.array | None = None
    weights: mx.array | None = None
    tiles: mx.array | None = None


def forward(backend: str, variant: Variant, operands: Operands) -> tuple[mx.array, mx.array]:
    """Run the forward kernel.

    Returns:
        h [N, F] in the dtype of the bases, and the sums [S, T, F] over tiles of rows, float32.
    """
    rows, features = _size(variant, operands)
    tiles = _tile_count(operands)
    shapes = [(rows, features), (variant.sums, tiles, features) if variant.sums else (1, 1, 1)]
    outputs = [operands.bases[0].dtype, mx.float32]
    h, sums = _call(backend, "forward", variant, operands, (), shapes, outputs)
    return h, sums


def backward(backend: str, variant: Variant, operands: Operands, dh: mx.array) -> tuple[mx.array, ...]:
    """Run the backward kernel: the gradients of the bases, in their shapes, from that of h, [N, F]."""
    rows, features = _size(variant, operands)
    dtype = operands.bases[0].dtype
    if variant.gate_up_layout == "separate":
        (d,) = _call(backend, "backward", variant, operands, (dh,), [(2, rows, features)], [dtype])
        # Views of it: d[0] would be a copy.
        return tuple(half.reshape(rows, features) for half in mx.split(d, 2))
    return tuple(_call(backend, "backward", variant, operands, (dh,), [(rows, 2 * features)], [dtype]))


def fits(projections: tuple[LowRank, ...]) -> bool:
    """Whether the low-rank products can be made inside the kernel: of one small rank, of one dtype, whole arrays."""
    ranks = {0 if p.low is None else p.low.shape[-1] for p in projections}
    if len(ranks) > 1 or not 0 < max(ranks) <= MAX_RANK:
        return False
    return all(a.size >= SMALLEST for p in projections for a in p.arrays)


def expert_tiles(experts: mx.array, count: int) -> mx.array:
    """Cut sorted rows into tiles of one expert each: [T, 3] int32 with T = ceil(N / TILE) + E, some of them empty.

    Args:
        experts: [N], the expert of each row, sorted.
        count: E.
    """
    rows = mx.sum(experts[None, :] == mx.arange(count)[:, None], axis=1).astype(mx.int32)  # [E]
    tiles = (rows + TILE - 1) // TILE  # [E]
    ends = mx.cumsum(tiles)  # tiles up to and with each expert
    total = -(-experts.size // TILE) + count
    tile = mx.arange(total, dtype=mx.int32)
    expert = mx.minimum(mx.sum(tile[:, None] >= ends[None, :], axis=1), count - 1).astype(mx.int32)  # [T]
    last = mx.cumsum(rows)[expert]  # row behind the expert's last
    start = last - rows[expert] + (tile - (ends - tiles)[expert]) * TILE
    return mx.stack([expert, mx.minimum(start, last), mx.minimum(start + TILE, last)], axis=1)


def _size(variant: Variant, operands: Operands) -> tuple[int, int]:
    rows, width = operands.bases[0].shape
    return rows, width if variant.gate_up_layout == "separate" else width // 2


def _tile_count(operands: Operands) -> int:
    if operands.tiles is not None:
        return operands.tiles.shape[0]
    return -(-operands.bases[0].shape[0] // TILE)


def _call(
    backend: str,
    direction: str,
    variant: Variant,
    operands: Operands,
    more: tuple[mx.array, ...],
    shapes: list[tuple[int, ...]],
    dtypes: list[mx.Dtype],
) -> list[mx.array]:
    rank = operands.lows[0].shape[-1] if operands.lows else 0
    dtype = operands.bases[0].dtype
    absent = mx.zeros(SMALLEST)
    constants = (*operands.scales, *(*variant.boundaries, 0.0, 0.0)[:2], *variant.activation.constants)
    p = mx.array((*constants, *(0.0,) * (8 - len(constants))), dtype=mx.float32)
    first_and_last = (0, -1)
    inputs = [operands.bases[i] for i in first_and_last]
    inputs.append(absent.astype(dtype) if operands.z0 is None else operands.z0)
    for arrays in (operands.lows, operands.bs):
        inputs += [arrays[i] if arrays else absent for i in first_and_last]
    inputs.append(absent if operands.weights is None else operands.weights)
    inputs.append(p)
    inputs.append(absent.astype(mx.int32) if operands.tiles is None else operands.tiles)
    template: list[tuple[str, Any]] = [
        ("T", dtype),
        ("L", operands.lows[0].dtype if operands.lows else mx.float32),
        ("RANK", rank),
        ("TILE", TILE),
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
    _, features = _size(variant, operands)
    return _kernel(backend, direction, variant.activation.kernel)(
        inputs=[*inputs, *more],
        template=template,
        grid=(-(-features // CHANNELS), _tile_count(operands), 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )


@cache
def source(name: str) -> str:
    """A file of the kernels, by its path in this package."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _kernel(backend: str, direction: str, activation: str) -> Any:
    header = source("metal/common.metal") + f"\ntypedef {activation} GATE;\n"
    body = source(f"metal/{direction}.metal")
    if backend == "cuda":  # which has no address spaces
        header, body = (text.replace("device ", "") for text in (header, body))
        header = source("cuda/prelude.cuh") + header
    return _built(backend, direction, activation, header, body)


@cache
def _built(backend: str, direction: str, activation: str, header: str, body: str) -> Any:
    """The kernel object of MLX; its source is compiled when it first runs with given dtypes and constants."""
    make: Any = mx.fast.cuda_kernel if backend == "cuda" else mx.fast.metal_kernel
    return make(
        name=f"nalora_{direction}_{activation}",
        input_names=[*INPUTS, *(["dh"] if direction == "backward" else [])],
        output_names=["h", "sums"] if direction == "forward" else ["d"],
        source=body,
        header=header,
    )
