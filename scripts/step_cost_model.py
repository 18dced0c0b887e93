"""What operations cost on a GPU: kernel launches, bytes and floating-point operations, and the time that follows.

The time of a step is predicted as

    sum over launches of max(bytes / (bandwidth * e_b), flops / (rate * e_f)) + launch time,

or the time in which the CPU encodes the launches if that is longer, plus the time in which it builds the graph, which
nothing overlaps. EFFICIENCY holds e_b, e_f and the times per operation; docs/step-cost.md says how they were found.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx

from nalora_mlx.training.traced_graph import Array, Operation

VIEWS = frozenset(
    (
        *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends", "ExpandDims"),
        *("Full", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
    )
)
STRIDED = frozenset(("AsStrided", "Broadcast", "BroadcastAxes", "Slice", "Split", "Transpose"))
COPIES_IF_STRIDED = frozenset(("Contiguous", "Flatten", "Reshape"))  # views of contiguous arrays
CONTIGUOUS_INPUTS = frozenset(("CustomKernel", "LogSumExp", "QuantizedMatmul", "Softmax"))
PRODUCTS = frozenset(("AddMM", "GatherMM", "Matmul", "SegmentedMM"))
SMALL = 1 << 16  # elements: a reduction of more to one value takes two launches
LONG_ROW = 4096  # elements: a softmax of longer rows reads them twice
PRODUCT_TILE = 16  # rows and columns of a product are computed in multiples of this
TILE = {"metal": 64, "cuda": 128}  # rows and columns of a product that one core computes at a time


class Chip(NamedTuple):
    """A GPU by its public figures.

    Attributes:
        backend: of MLX.
        bandwidth: of memory, GB/s.
        half: TFLOP/s of products in bfloat16.
        single: TFLOP/s in float32, without tensor cores.
        cores: GPU cores, or streaming multiprocessors.
        memory: GB that MLX may use, in the largest configuration.
    """

    backend: str
    bandwidth: float
    half: float
    single: float
    cores: int
    memory: float


CHIPS = {
    "M1": Chip("metal", 68, 2.6, 2.6, 8, 11),
    "M1 Pro": Chip("metal", 200, 5.3, 5.3, 16, 21),
    "M1 Max": Chip("metal", 400, 10.6, 10.6, 32, 48),
    "M1 Ultra": Chip("metal", 800, 21.2, 21.2, 64, 96),
    "M2": Chip("metal", 100, 3.6, 3.6, 10, 16),
    "M2 Pro": Chip("metal", 200, 6.8, 6.8, 19, 21),
    "M2 Max": Chip("metal", 400, 13.6, 13.6, 38, 72),
    "M2 Ultra": Chip("metal", 800, 27.2, 27.2, 76, 144),
    "M3": Chip("metal", 100, 3.5, 3.5, 10, 16),
    "M3 Pro": Chip("metal", 150, 6.4, 6.4, 18, 27),
    "M3 Max": Chip("metal", 400, 14.2, 14.2, 40, 96),
    "M3 Ultra": Chip("metal", 819, 28.4, 28.4, 80, 384),
    "M4": Chip("metal", 120, 4.3, 4.3, 10, 24),
    "M4 Pro": Chip("metal", 273, 8.6, 8.6, 20, 48),
    "M4 Max": Chip("metal", 546, 17.2, 17.2, 40, 96),
    "M5": Chip("metal", 153, 17.0, 4.3, 10, 24),
    "M5 Pro": Chip("metal", 307, 34.0, 8.6, 20, 48),
    "M5 Max": Chip("metal", 614, 68.0, 17.2, 40, 96),
    "RTX 4090": Chip("cuda", 1008, 165, 82.6, 128, 24),
    "A100": Chip("cuda", 2039, 312, 19.5, 108, 80),
    "H100": Chip("cuda", 3350, 989, 67, 132, 80),
    "H200": Chip("cuda", 4800, 989, 67, 132, 141),
}


class Efficiency(NamedTuple):
    """How much of a chip's figures MLX reaches, and what an operation costs apart from that.

    Attributes:
        bandwidth: share of the memory bandwidth.
        half: share of the rate of products in half precision.
        single: the same in float32.
        launch: seconds of the GPU per launch.
        encode: seconds of the CPU per launch, during which the GPU may run earlier ones.
        build: seconds of the CPU per operation of the graph before the GPU starts.
    """

    bandwidth: float
    half: float
    single: float
    launch: float
    encode: float
    build: float


EFFICIENCY = {
    "metal": Efficiency(0.75, 0.70, 0.70, 4e-6, 2e-6, 1.5e-6),
    "cuda": Efficiency(0.70, 0.70, 0.70, 2e-6, 4e-6, 3e-6),
}


class Cost(NamedTuple):
    """What an operation costs.

    Attributes:
        kind: of the operation, or the name of a custom kernel.
        launches: number of kernels.
        bytes: number of bytes read and written.
        flops: of products, in half precision.
        flops_single: of products, in float32.
        tiles: blocks of results that are computed side by side; one core computes one at a time.
    """

    kind: str
    launches: int
    bytes: int
    flops: int = 0
    flops_single: int = 0
    tiles: int = 1 << 30


class Total(NamedTuple):
    """The cost of a step."""

    operations: int  # of the graph after fusion, views included
    costs: tuple[Cost, ...]

    @property
    def launches(self) -> int:
        """Number of kernel launches."""
        return sum(cost.launches for cost in self.costs)

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return sum(cost.bytes for cost in self.costs)

    @property
    def flops(self) -> int:
        """Floating-point operations of all products."""
        return sum(cost.flops + cost.flops_single for cost in self.costs)

    def seconds(self, chip: Chip, efficiency: Efficiency | None = None) -> float:
        """Return the predicted time of a step."""
        e = efficiency or EFFICIENCY[chip.backend]
        gpu = self.launches * e.launch
        for cost in self.costs:
            moving = cost.bytes / (1e9 * chip.bandwidth * e.bandwidth)
            computing = cost.flops / (1e12 * chip.half * e.half)
            computing += cost.flops_single / (1e12 * chip.single * e.single)
            gpu += max(moving, computing / min(1, cost.tiles / chip.cores))
        return max(gpu, self.launches * e.encode) + self.operations * e.build


def total_cost(graphs: Iterable[list[Operation]], backend: str) -> Total:
    """Return the cost of the operations of compiled functions that run one after another."""
    lists = list(graphs)
    costs = tuple(cost for operations in lists for cost in operation_costs(operations, backend))
    return Total(sum(map(len, lists)), costs)


def operation_costs(operations: Iterable[Operation], backend: str) -> Iterator[Cost]:
    """Yield the cost of each operation that launches a kernel."""
    counter = _Counter(backend)
    for operation in operations:
        yield from counter.costs(operation)


class _Counter:
    """Follows which arrays are strided views, and how many bytes there are behind a broadcast."""

    def __init__(self, backend: str):
        self.tile = TILE[backend]
        self.strided: set[str] = set()
        self.sizes: dict[str, int] = {}  # bytes behind a view

    def size(self, array: Array) -> int:
        return self.sizes.get(array.name, array.nbytes)

    def moved(self, operation: Operation) -> int:
        """Return the bytes of each different input once, and of the outputs."""
        inputs = {a.name: self.size(a) for a in operation.inputs}
        return sum(inputs.values()) + sum(a.nbytes for a in operation.outputs)

    def costs(self, operation: Operation) -> Iterator[Cost]:
        kind, inputs, outputs = operation.kind, operation.inputs, operation.outputs
        if kind in VIEWS or (kind in COPIES_IF_STRIDED and inputs[0].name not in self.strided):
            self._follow_view(operation)
            return
        if kind in CONTIGUOUS_INPUTS:
            copied = [a for a in inputs if a.name in self.strided and self.size(a) == a.nbytes]
            for array in copied:
                yield Cost("copy", 1, 2 * array.nbytes)
        if kind in PRODUCTS:
            yield self._product(operation)
        elif kind == "QuantizedMatmul":
            rows, columns = math.prod(outputs[0].shape[:-1]), outputs[0].shape[-1]
            tiles = -(-rows // self.tile) * -(-columns // self.tile)
            flops = 2 * _padded(rows) * inputs[0].shape[-1] * columns
            yield Cost(kind, 1, self.moved(operation), flops, 0, tiles)
        elif kind == "CustomKernel":
            yield self._kernel(operation)
        else:
            yield Cost(kind, self._launches(operation), self._bytes(operation))

    def _follow_view(self, operation: Operation) -> None:
        inputs, outputs = operation.inputs, operation.outputs
        if not inputs:
            return
        sources = inputs[: len(outputs)] if operation.kind == "Depends" else inputs[:1] * len(outputs)
        for source, output in zip(sources, outputs, strict=True):
            reordered = operation.kind in STRIDED and not _same_order(source, output, operation)
            if reordered or source.name in self.strided:
                self.strided.add(output.name)
            if operation.kind == "Broadcast" or source.nbytes == output.nbytes:
                self.sizes[output.name] = min(self.size(source), output.nbytes)

    def _launches(self, operation: Operation) -> int:
        kind, inputs = operation.kind, operation.inputs
        if kind == "Concatenate":
            return len(inputs)
        if kind == "Reduce":
            return 2 if math.prod(operation.outputs[0].shape) == 1 and _elements(inputs[0]) > SMALL else 1
        if kind in ("Pad", "Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate"):
            return 2  # a copy, then the change
        if kind in ("ArgPartition", "ArgSort", "Partition", "Sort"):
            return 1 if inputs[0].shape[-1] <= 2048 else 4
        return 1

    def _bytes(self, operation: Operation) -> int:
        kind, inputs, outputs = operation.kind, operation.inputs, operation.outputs
        if kind in ("Gather", "GatherAxis"):
            return 2 * outputs[0].nbytes + sum(a.nbytes for a in inputs[1:])
        if kind in ("Scatter", "ScatterAxis", "SliceUpdate"):
            return self.size(inputs[0]) + outputs[0].nbytes + 2 * sum(a.nbytes for a in inputs[1:])
        if kind in ("Softmax", "LogSumExp") and inputs[0].shape[-1] > LONG_ROW:
            return self.moved(operation) + inputs[0].nbytes
        return self.moved(operation)

    def _product(self, operation: Operation) -> Cost:
        a, b, out = operation.inputs[0], operation.inputs[1], operation.outputs[0]
        rows, depth, columns = a.shape[-2], a.shape[-1], out.shape[-1]
        batch = math.prod(out.shape[:-2])
        one_matrix = self.size(b) <= depth * columns * b.dtype.size
        if one_matrix:  # the rows of all matrices form one
            rows, batch = rows * batch, 1
        launches, moved = 1, self.moved(operation)
        small = (rows // PRODUCT_TILE) * (columns // PRODUCT_TILE) <= 32
        if (
            batch == 1 and small and depth >= 8 * PRODUCT_TILE
        ):  # split along the inner dimension, then added up
            launches, moved = 2, moved + 2 * 4 * 16 * rows * columns
        tiles = batch * -(-rows // self.tile) * -(-columns // self.tile) * (16 if launches == 2 else 1)
        flops = 2 * batch * _padded(rows) * depth * _padded(columns)
        if mx.float32 in (a.dtype, b.dtype):
            return Cost(operation.kind, launches, moved, 0, flops, tiles)
        return Cost(operation.kind, launches, moved, flops, 0, tiles)

    def _kernel(self, operation: Operation) -> Cost:
        name = kernel_name(operation)
        inputs, moved = operation.inputs, self.moved(operation)
        if name.startswith("attention"):  # causal: half of the scores
            q, k = inputs[0].shape, inputs[1].shape
            flops = 2 * math.prod(q) * k[-2]
            return Cost(name, 1, moved, flops * 5 // 2 if name.endswith("vjp") else flops)
        if name == "rms_norm_vjp":  # the gradient of the weight is a row per row of x, then summed
            return Cost(name, 2, moved + inputs[0].nbytes)
        if name.startswith("nalora"):
            low = inputs[3]
            rank = low.shape[-1] if len(low.shape) == 2 else 0
            flops = 4 * _elements(inputs[0]) * rank
            return Cost(name, 1, moved, 0, flops)
        return Cost(name, 1, moved)


KERNELS = ("nalora_forward", "nalora_backward", "rms_norm_vjp", "rms_norm", "rope_vjp", "rope")
KERNELS += ("attention_vjp", "attention")


def kernel_name(operation: Operation) -> str:
    """Return the name of a custom kernel, without the activation and dtypes that follow it."""
    name = str(operation.arguments[0]).removeprefix("custom_kernel_")
    return next((known for known in KERNELS if name.startswith(known)), name)


def _same_order(source: Array, output: Array, operation: Operation) -> bool:
    """Return whether the elements of a view follow one another in memory."""
    if operation.kind == "Transpose":
        axes: Any = operation.arguments[0]
        long_axes = [axis for axis in axes if source.shape[axis] > 1]
        return long_axes == sorted(long_axes)
    if operation.kind in ("Slice", "Split"):  # of the first axis that is longer than 1
        first = next((i for i, n in enumerate(source.shape) if n > 1), 0)
        return source.shape[first + 1 :] == output.shape[first + 1 :]
    return source.nbytes == output.nbytes


def _elements(array: Array) -> int:
    return math.prod(array.shape)


def _padded(n: int) -> int:
    return -(-n // PRODUCT_TILE) * PRODUCT_TILE
