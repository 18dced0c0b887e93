"""What a graph of MLX reads and writes on a GPU, and what it keeps for its backward, from the graph alone."""

import math
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from nalora_mlx.kernels.fused import CHANNELS, INPUTS, THREADS, TILE

CONSTANTS = ("Broadcast", "Full")
VIEWS = ("Transpose", "Reshape", "Squeeze", "ExpandDims", "Slice", "Split", "Flatten", "Unflatten")
VIEWS += ("CustomTransforms", "StopGradient", *CONSTANTS)
STUB = "Depends"
Shape = tuple[int, ...]


class Stub:
    """Stands in a graph for our kernels: operations of the same inputs and outputs that nothing fuses with."""

    def __init__(self) -> None:
        self.outputs: dict[int, list[mx.array]] = {}  # by how many a kernel has: two forward, one backward

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        output_shapes: list[Shape],
        output_dtypes: list[mx.Dtype],
        **_: object,
    ) -> list[mx.array]:
        """Take the place of one kernel."""
        outputs = [mx.zeros(*one) for one in zip(output_shapes, output_dtypes, strict=True)]
        self.outputs[len(outputs)] = outputs
        found: list[mx.array] = mx.depends(outputs, inputs)
        return found


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written; and how many arrays of [N, F] are kept from the forward for the backward."""

    bytes: int
    kept: int


def traffic(
    outputs: list[mx.array], inputs: list[mx.array], stub: Stub, sizes: Shape, dtype: mx.Dtype
) -> Traffic:
    """Count a forward and backward.

    Every operation reads each of its inputs and writes each of its outputs once, views apart. A kernel of ours reads
    B once per tile of rows, and x A and the weights of rows once per threadgroup along the channels.

    Args:
        outputs: of the compiled function; not evaluated.
        inputs: its arguments, of which the last is the gradient of the output.
        stub: that stood for the kernels.
        sizes: N and F.
        dtype: of the model, to which a fused operation casts unless a product with float32 follows.
    """
    named = {f"in{i}": a for i, a in enumerate(inputs)} | {f"out{i}": a for i, a in enumerate(outputs)}
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *outputs, **named)
        graph = Graph(Path(file.name).read_text(), named, stub, dtype)
    total, kept = 0, set()
    gradient = f"in{len(inputs) - 1}"
    after = graph.after(gradient)
    for operation in graph.needed([name for name in named if name.startswith("out")]):
        if graph.kinds[operation] in VIEWS:
            continue
        writes, reads = graph.writes[operation], graph.reads[operation]
        times = [1] * len(reads)
        if graph.kinds[operation] == STUB:
            reads = reads[len(writes) :]  # without what the stub makes its outputs of
            rows, features = sizes
            groups, tiles = -(-features // (CHANNELS * THREADS)), -(-rows // TILE)
            often = {"ag": groups, "au": groups, "w": groups, "bg": tiles, "bu": tiles}
            times = [often.get(name, 1) for name in (*INPUTS, "dh")][: len(reads)]
        total += sum(map(graph.bytes, writes))
        total += sum(n * graph.bytes(a) for a, n in dict(zip(reads, times, strict=True)).items())
        if operation in after:
            whole = {a for a in reads if math.prod(graph.shape(a)) == math.prod(sizes)}
            kept |= {a for a in whole if graph.maker.get(a) not in after and not graph.is_constant(a)}
    return Traffic(total, len(kept - {gradient}))


@dataclass
class Graph:
    """Operations and the arrays between them, by the names that MLX gives them in its drawing."""

    text: str
    known: dict[str, mx.array]
    stub: Stub
    dtype: mx.Dtype
    kinds: dict[str, str] = field(init=False)
    reads: dict[str, list[str]] = field(init=False)
    writes: dict[str, list[str]] = field(init=False)
    maker: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.kinds = dict(re.findall(r"\{ (\d+) \[label =\"([^\"]*)\"", self.text))
        self.reads, self.writes, self.maker = {o: [] for o in self.kinds}, {o: [] for o in self.kinds}, {}
        for edge in re.findall(r"^(\S+) -> (\S+)$", self.text, re.M):
            a, b = (name.strip('"') for name in edge)
            if b in self.kinds:
                self.reads[b].append(a)
            else:
                self.writes[a].append(b)
                if not b.startswith("in"):  # how an input was made is no part of the function
                    self.maker[b] = a

    def needed(self, arrays: list[str]) -> set[str]:
        """The operations that arrays are made by, down to the inputs."""
        found: set[str] = set()
        while arrays:
            operation = self.maker.get(arrays.pop())
            if operation is not None and operation not in found:
                found.add(operation)
                arrays += self.reads[operation]
        return found

    def after(self, array: str) -> set[str]:
        """The operations that depend on an array."""
        found: set[str] = set()
        left = {array}
        while left:
            new = {o for o in self.kinds if o not in found and left & {*self.reads[o]}}
            found |= new
            left = {a for o in new for a in self.writes[o] if a in self.maker}
        return found

    def is_constant(self, array: str) -> bool:
        """Whether an array is one value, repeated without memory."""
        return self.made_by(array) in CONSTANTS

    def bytes(self, array: str) -> int:
        """Bytes of an array, none for a constant."""
        return 0 if self.is_constant(array) else math.prod(self.shape(array)) * self.dtype_of(array).size

    def known_as(self, array: str) -> mx.array | None:
        """An array of the shape and dtype of a known one, or of what a kernel makes."""
        operation = self.maker.get(array)
        if array in self.known or operation is None or self.kinds[operation] != STUB:
            return self.known.get(array)
        writes = self.writes[operation]
        return self.stub.outputs[len(writes)][writes.index(array)]

    def shape(self, array: str) -> Shape:
        """Shape of an array as its maker implies it."""
        if (made := self.known_as(array)) is not None:
            return made.shape
        operation = self.maker.get(array)
        if operation is None:
            return ()
        shapes = [self.shape(a) for a in self.reads[operation]]
        kind, writes = self.kinds[operation], self.writes[operation]
        if kind == "Matmul":
            return (*shapes[0][:-1], shapes[1][-1])
        if kind == "CustomTransforms":  # which reads what it is a function of, and then what it returns
            return shapes[writes.index(array) - len(writes)]
        if kind == "Transpose":
            return shapes[0][::-1]
        if kind == "Split":
            return (shapes[0][0] // len(writes), *shapes[0][1:])
        if kind == "Sum":  # over tiles
            return (shapes[0][0], shapes[0][-1])
        return max(shapes, key=math.prod, default=())

    def dtype_of(self, array: str) -> mx.Dtype:
        """Dtype of an array as its maker implies it, and where that casts, its use."""
        if (made := self.known_as(array)) is not None:
            return made.dtype
        operation = self.maker.get(array)
        if operation is None:
            return self.dtype
        kind = self.kinds[operation]
        if "AsType" in kind:
            return mx.float32 if mx.float32 in self.factors_beside(array) else self.dtype
        if kind == "Matmul":
            return self.dtype_of(self.reads[operation][0])
        found = {self.dtype_of(a) for a in self.reads[operation] if not self.is_constant(a)}
        return mx.float32 if mx.float32 in found else self.dtype

    def factors_beside(self, array: str) -> set[mx.Dtype]:
        """Dtypes of what an array, or a view of it, is multiplied with; casts are left out."""
        found = set()
        for operation, reads in self.reads.items():
            if array not in reads:
                continue
            if self.kinds[operation] in VIEWS:
                found |= self.factors_beside(self.writes[operation][0])
            elif self.kinds[operation] == "Matmul":
                found |= {self.dtype_of(a) for a in reads if a != array and "AsType" not in self.made_by(a)}
        return found

    def made_by(self, array: str) -> str:
        """The kind of operation that makes an array, views of it apart."""
        operation = self.maker.get(array)
        if operation is None:
            return ""
        kind, reads = self.kinds[operation], self.reads[operation]
        if kind in CONSTANTS or kind not in VIEWS:
            return kind
        return self.made_by(reads[0])
