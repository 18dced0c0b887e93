"""Memory traffic of a compiled MLX graph on a GPU, counted without running it."""

import math
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from nalora_mlx.ops.kernels.fused import CHANNELS, INPUTS, THREADS, TILE

CONSTANTS = ("Broadcast", "Full")
VIEWS = ("Transpose", "Reshape", "Squeeze", "ExpandDims", "Slice", "Split", "Flatten", "Unflatten")
STUB = "Depends"  # the operation of mx.depends, which KernelStub uses
ORDER = "Order"  # that of other calls of mx.depends; its outputs are its first inputs
VIEWS += ("AsStrided", "CustomTransforms", "StopGradient", ORDER, *CONSTANTS)
Shape = tuple[int, ...]


class KernelStub:
    """A replacement for our kernels in a graph, with the same inputs and outputs, that MLX does not fuse."""

    def __init__(self) -> None:
        # Keyed by the number of outputs, which identifies the kernel: the forward has two, the backward one.
        self.outputs: dict[int, list[mx.array]] = {}

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        output_shapes: list[Shape],
        output_dtypes: list[mx.Dtype],
        **_: object,
    ) -> list[mx.array]:
        outputs = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        self.outputs[len(outputs)] = outputs
        result: list[mx.array] = mx.depends(outputs, inputs)
        return result


@dataclass(frozen=True)
class Traffic:
    """Memory traffic of a forward and backward pass.

    Attributes:
        bytes: read and written.
        kept: number of [N, F] arrays kept from the forward for the backward pass.
    """

    bytes: int
    kept: int


def graph_traffic(
    outputs: list[mx.array], inputs: list[mx.array], stub: KernelStub, sizes: Shape, dtype: mx.Dtype
) -> Traffic:
    """Count the memory traffic of a forward and backward pass.

    Every operation other than a view reads each input and writes each output once. Our kernels read B once per tile of
    rows, and x A and the row weights once per threadgroup along the channels.

    Args:
        outputs: outputs of the compiled function, not evaluated.
        inputs: arguments of the function; the last one is the gradient of the output.
        stub: the stub used in place of the kernels.
        sizes: N and F.
        dtype: dtype of the model. Fused operations cast to it unless a float32 product follows.
    """
    named = {f"in{i}": a for i, a in enumerate(inputs)} | {f"out{i}": a for i, a in enumerate(outputs)}
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *outputs, **named)
        graph = Graph(Path(file.name).read_text(), named, stub, dtype)
    rows, features = sizes
    threadgroups, tiles = -(-features // (CHANNELS * THREADS)), -(-rows // TILE)
    kernel_reads = {"ag": threadgroups, "au": threadgroups, "w": threadgroups, "bg": tiles, "bu": tiles}
    total, kept = 0, set()
    gradient = f"in{len(inputs) - 1}"
    backward = graph.dependents(gradient)
    for operation in graph.ancestors([name for name in named if name.startswith("out")]):
        if graph.kinds[operation] in VIEWS:
            continue
        writes, reads = graph.writes[operation], graph.reads[operation]
        times_read = [1] * len(reads)
        if graph.kinds[operation] == STUB:
            reads = reads[len(writes) :]  # skip the zeros that the stub's outputs are made from
            times_read = [kernel_reads.get(name, 1) for name in (*INPUTS, "dh")][: len(reads)]
        total += sum(map(graph.bytes, writes))
        total += sum(n * graph.bytes(a) for a, n in dict(zip(reads, times_read, strict=True)).items())
        if operation in backward:
            full_size = {a for a in reads if math.prod(graph.shape(a)) == rows * features}
            kept |= {
                a for a in full_size if graph.producer.get(a) not in backward and not graph.is_constant(a)
            }
    return Traffic(total, len(kept - {gradient}))


@dataclass
class Graph:
    """The operations of a graph and the arrays between them, under the names in MLX's DOT export.

    Attributes:
        text: the DOT file.
        known: inputs and outputs by name.
        stub: the stub used in place of the kernels.
        dtype: dtype of the model.
        kinds: operation -> type of operation.
        reads: operation -> input arrays.
        writes: operation -> output arrays.
        producer: array -> the operation that writes it.
    """

    text: str
    known: dict[str, mx.array]
    stub: KernelStub
    dtype: mx.Dtype
    kinds: dict[str, str] = field(init=False)
    reads: dict[str, list[str]] = field(init=False)
    writes: dict[str, list[str]] = field(init=False)
    producer: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.kinds = dict(re.findall(r"\{ (\d+) \[label =\"([^\"]*)\"", self.text))
        self.reads, self.writes, self.producer = {o: [] for o in self.kinds}, {o: [] for o in self.kinds}, {}
        for edge in re.findall(r"^(\S+) -> (\S+)$", self.text, re.M):
            source, target = (name.strip('"') for name in edge)
            if target in self.kinds:
                self.reads[target].append(source)
            else:
                self.writes[source].append(target)
                if not target.startswith("in"):  # operations that produce the inputs do not count
                    self.producer[target] = source
        for operation, kind in self.kinds.items():
            if kind == STUB and len(self.reads[operation]) < len(INPUTS):  # an ordinary mx.depends
                self.kinds[operation] = ORDER

    def ancestors(self, arrays: list[str]) -> set[str]:
        """Return the operations that the arrays are computed by, back to the inputs."""
        found: set[str] = set()
        while arrays:
            operation = self.producer.get(arrays.pop())
            if operation is not None and operation not in found:
                found.add(operation)
                arrays += self.reads[operation]
        return found

    def dependents(self, array: str) -> set[str]:
        """Return the operations that depend on an array."""
        found: set[str] = set()
        frontier = {array}
        while frontier:
            new = {o for o in self.kinds if o not in found and frontier & {*self.reads[o]}}
            found |= new
            frontier = {a for o in new for a in self.writes[o] if a in self.producer}
        return found

    def is_constant(self, array: str) -> bool:
        """Return whether an array is a single broadcast value, which takes no memory."""
        return self.producer_kind(array) in CONSTANTS

    def bytes(self, array: str) -> int:
        """Return the size of an array in bytes, 0 for a constant."""
        return 0 if self.is_constant(array) else math.prod(self.shape(array)) * self.dtype_of(array).size

    def known_array(self, array: str) -> mx.array | None:
        """Return the actual array of an input, an output or a stub's output, whose shape and dtype are known."""
        operation = self.producer.get(array)
        if array in self.known or operation is None or self.kinds[operation] != STUB:
            return self.known.get(array)
        writes = self.writes[operation]
        return self.stub.outputs[len(writes)][writes.index(array)]

    def shape(self, array: str) -> Shape:
        """Return the shape of an array, inferred from the operation that produces it."""
        if (known := self.known_array(array)) is not None:
            return known.shape
        operation = self.producer.get(array)
        if operation is None:
            return ()
        shapes = [self.shape(a) for a in self.reads[operation]]
        kind, writes = self.kinds[operation], self.writes[operation]
        if kind == "Matmul":
            return (*shapes[0][:-1], shapes[1][-1])
        if kind == "CustomTransforms":  # its inputs are the function's arguments, then its outputs
            return shapes[writes.index(array) - len(writes)]
        if kind == ORDER:
            return shapes[writes.index(array)]
        if kind == "Transpose":
            return shapes[0][::-1]
        if kind == "Split":
            return (shapes[0][0] // len(writes), *shapes[0][1:])
        if kind == "Sum":  # over tiles
            return (shapes[0][0], shapes[0][-1])
        return max(shapes, key=math.prod, default=())

    def dtype_of(self, array: str) -> mx.Dtype:
        """Return the dtype of an array, inferred from its producer or, after a cast, from its use."""
        if (known := self.known_array(array)) is not None:
            return known.dtype
        operation = self.producer.get(array)
        if operation is None:
            return self.dtype
        kind = self.kinds[operation]
        if "AsType" in kind:
            return mx.float32 if mx.float32 in self.matmul_partner_dtypes(array) else self.dtype
        if kind == "Matmul":
            return self.dtype_of(self.reads[operation][0])
        if kind == ORDER:
            return self.dtype_of(self.reads[operation][self.writes[operation].index(array)])
        dtypes = {self.dtype_of(a) for a in self.reads[operation] if not self.is_constant(a)}
        return mx.float32 if mx.float32 in dtypes else self.dtype

    def matmul_partner_dtypes(self, array: str) -> set[mx.Dtype]:
        """Return the dtypes of the arrays that an array or its views are multiplied with, except casts."""
        dtypes = set()
        for operation, reads in self.reads.items():
            if array not in reads:
                continue
            if self.kinds[operation] in VIEWS:
                dtypes |= self.matmul_partner_dtypes(self.writes[operation][0])
            elif self.kinds[operation] == "Matmul":
                partners = [a for a in reads if a != array and "AsType" not in self.producer_kind(a)]
                dtypes |= {self.dtype_of(a) for a in partners}
        return dtypes

    def producer_kind(self, array: str) -> str:
        """Return the type of the operation that produces an array, looking through views."""
        operation = self.producer.get(array)
        if operation is None:
            return ""
        kind, reads = self.kinds[operation], self.reads[operation]
        if kind in CONSTANTS or kind not in VIEWS:
            return kind
        return self.producer_kind(reads[0])
