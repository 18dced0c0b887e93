"""The memory that a traced graph takes at most while MLX evaluates it.

The peak is that of a simulation:

1. Fuse elementwise operations as mx.compile does. A fused operation needs all of its inputs until it runs.
2. Order the operations as mx.eval does.
3. Go through them. Each output gets a buffer, except for views, which share one. A buffer is free once all operations
   that read it or a view of it have finished.

MLX starts operations before earlier ones have finished: a CPU up to 11 tasks of 10 loops or copies, Metal up to 11
command buffers of 50 operations or 50 Mi elements. The simulation assumes the worst: an operation finishes when MLX
waits for it. For the same reason it assumes that no operation writes to the buffer of an input.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from nalora_mlx.ops.device_sizes import device_kind
from nalora_mlx.training.traced_graph import Array, Operation, TracedGraph


def _kinds(names: str) -> frozenset[str]:
    return frozenset(names.split())


VIEWS = _kinds(
    "AsStrided Broadcast BroadcastAxes Copy CustomTransforms Depends ExpandDims Slice Split Squeeze StopGradient "
    "Transpose View"
)
STRIDED = _kinds("Broadcast BroadcastAxes Slice Split Transpose")  # views with gaps
COPIES_IF_STRIDED = _kinds("Contiguous Flatten Reshape Unflatten")  # views of contiguous arrays
ELEMENTWISE = _kinds(
    "Abs Add ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTan2 ArcTanh AsType BitwiseBinary BitwiseInvert Broadcast Ceil "
    "Conjugate Cos Cosh Divide Equal Erf ErfInv Exp Expm1 Floor Greater GreaterEqual Less LessEqual Log Log1p "
    "LogAddExp LogicalAnd LogicalNot LogicalOr Maximum Minimum Multiply Negative NotEqual Power Remainder Round Rsqrt "
    "Select Sigmoid Sign Sin Sinh Sqrt Square Subtract Tan Tanh"
)
# They read strided inputs in place. All others may copy them.
READ_STRIDED = ELEMENTWISE | VIEWS | COPIES_IF_STRIDED | {"Compiled", "Concatenate", "Reduce", "SliceUpdate"}
MAX_DEPTH = 11  # of a fused operation
MAX_WIDTH = 20  # of the breadth-first search in mx.eval
MAX_TASKS = 11  # that are started and not finished
PAGE = 1 << 14  # bytes, to which allocators round up


class TaskSize(NamedTuple):
    """How much work a task takes before the next one begins."""

    operations: int
    elements: float  # that they read and write


# An operation of a CPU is two entries of a task: the work and the release of its buffers.
TASK_SIZES = {
    "cpu": TaskSize(5, float("inf")),
    "metal": TaskSize(50, 50 * 2**20),
    "cuda": TaskSize(100, 1000 * 2**20),  # of the largest GPUs
}


def peak_bytes(graph: TracedGraph, task_size: TaskSize | None = None) -> int:
    """Return the most bytes that the graph's arrays take at once, without inputs and constants.

    Args:
        graph: as traced.
        task_size: how much is in flight; that of the default device if None.
    """
    operations = evaluation_order(fused(graph))
    buffers = Buffers(operations, graph.outputs)
    tasks = _tasks(operations, task_size or TASK_SIZES[device_kind()])
    freed = [0] * (tasks[-1] + MAX_TASKS + 1) if tasks else []  # bytes freed before each task begins
    live = peak = current = 0
    for i, task in enumerate(tasks):
        while current < task:
            current += 1
            live -= freed[current]
        live += buffers.allocated[i]
        peak = max(peak, live)
        freed[task + MAX_TASKS] += buffers.released[i]
    return peak


class Buffers:
    """The bytes that each operation allocates, and those that nothing needs after it."""

    def __init__(self, operations: Sequence[Operation], outputs: Sequence[Array]):
        self.allocated = [0] * len(operations)
        self.released = [0] * len(operations)
        self._buffer = dict[str, int]()  # array -> its buffer; absent for inputs and constants
        self._strided = set[str]()
        sizes, last_use = list[int](), list[int]()
        for i, operation in enumerate(operations):
            for array in operation.inputs:
                if array.name in self._buffer:
                    last_use[self._buffer[array.name]] = i
            if operation.kind not in READ_STRIDED:
                copied = sum(_rounded(a) for a in operation.inputs if a.name in self._strided)
                self.allocated[i] += copied
                self.released[i] += copied
            for source, output in self._shared(operation):
                if source.name in self._buffer:
                    self._buffer[output.name] = self._buffer[source.name]
            shared = {output.name for _, output in self._shared(operation)}
            for output in operation.outputs:
                if output.name not in shared:
                    self._buffer[output.name] = len(sizes)
                    sizes.append(_rounded(output))
                    last_use.append(i)
                    self.allocated[i] += sizes[-1]
        kept = {self._buffer[array.name] for array in outputs if array.name in self._buffer}
        for number, (size, last) in enumerate(zip(sizes, last_use, strict=True)):
            if number not in kept:
                self.released[last] += size

    def _shared(self, operation: Operation) -> list[tuple[Array, Array]]:
        """Return which outputs are views, each with the input that it is a view of."""
        kind, inputs, outputs = operation.kind, operation.inputs, operation.outputs
        if kind in COPIES_IF_STRIDED and inputs[0].name in self._strided:
            return []
        if kind not in VIEWS and kind not in COPIES_IF_STRIDED:
            return []
        sources = inputs[: len(outputs)] if kind == "Depends" else inputs[:1] * len(outputs)
        pairs = list(zip(sources, outputs, strict=True))
        for source, output in pairs:
            if kind in STRIDED or source.name in self._strided:
                self._strided.add(output.name)
        return pairs


def _rounded(array: Array) -> int:
    return array.nbytes if array.nbytes < PAGE else -(-array.nbytes // PAGE) * PAGE


def _tasks(operations: Sequence[Operation], size: TaskSize) -> list[int]:
    """Return the number of the task of each operation."""
    tasks, task, count, elements = list[int](), 0, 0, 0
    for operation in operations:
        tasks.append(task)
        if operation.kind in VIEWS:
            continue
        count += 1
        elements += sum(_elements(a) for a in (*operation.inputs, *operation.outputs))
        if count >= size.operations or elements >= size.elements:
            task, count, elements = task + 1, 0, 0
    return tasks


def _elements(array: Array) -> int:
    return array.nbytes // array.dtype.size


def fused(graph: TracedGraph) -> TracedGraph:
    """Return the graph with elementwise operations fused as mx.compile fuses them.

    From the last operation to the first: an operation joins the fused operation that reads its output if no other
    operation reads it, up to a depth of `MAX_DEPTH`. If it is an output of the graph, it becomes one of the fused
    operation. A broadcast joins all that read it.
    """
    operations = graph.operations
    producer = {array.name: i for i, o in enumerate(operations) for array in o.outputs}
    readers = dict[int, list[int]]()
    for i, operation in enumerate(operations):
        for array in operation.inputs:
            if array.name in producer:
                readers.setdefault(producer[array.name], []).append(i)
    kept = {array.name for array in graph.outputs}
    taken, groups = set[int](), dict[int, set[int]]()
    for root in reversed(range(len(operations))):
        if root in taken or operations[root].kind not in ELEMENTWISE - {"Broadcast"}:
            continue
        group, stack = {root}, [(root, 0)]
        while stack:
            index, depth = stack.pop()
            for array in operations[index].inputs:
                source = producer.get(array.name)
                if source is None or source in group or source in taken or depth + 1 >= MAX_DEPTH:
                    continue
                alone = all(reader in group for reader in readers[source])
                if operations[source].kind == "Broadcast" or (
                    alone and operations[source].kind in ELEMENTWISE
                ):
                    group.add(source)
                if alone and source in group:
                    stack.append((source, depth + 1))
        if len(group) > 1:
            groups[root] = group
            taken |= {i for i in group if operations[i].kind != "Broadcast"}
    taken |= {
        i
        for i, operation in enumerate(operations)
        if operation.kind == "Broadcast"
        and operation.outputs[0].name not in kept
        and all(reader in taken for reader in readers.get(i, ()))
    }
    return replace(graph, operations=tuple(_with_fused(operations, groups, taken, kept)))


def _with_fused(
    operations: Sequence[Operation], groups: dict[int, set[int]], taken: set[int], kept: set[str]
) -> Iterator[Operation]:
    """Yield the operations, with one operation in place of each group, where its last member was."""
    for i, operation in enumerate(operations):
        if i in groups:
            members = [operations[k] for k in sorted(groups[i])]
            inside = {array.name for member in members for array in member.outputs}
            inputs = {a.name: a for member in members for a in member.inputs if a.name not in inside}
            outputs = [m.outputs[0] for m in members[:-1] if m.outputs[0].name in kept]
            yield Operation("Compiled", (), tuple(inputs.values()), (*outputs, *operation.outputs))
        elif i not in taken:
            yield operation


def evaluation_order(graph: TracedGraph) -> list[Operation]:
    """Return the operations in the order in which mx.eval starts them.

    It searches backwards from the outputs, breadth first, and adds an operation once all that read it are added. If
    more than `MAX_WIDTH` operations wait, it puts the current one aside and goes on with the first of those.
    """
    operations = graph.operations
    producer = {array.name: i for i, o in enumerate(operations) for array in o.outputs}
    edges = [[producer[a.name] for a in o.inputs if a.name in producer] for o in operations]
    edges.append([producer[a.name] for a in graph.outputs if a.name in producer])
    unread = Counter(source for sources in edges for source in sources)
    tape, aside, position = [len(operations)], list[tuple[int, int]](), 0
    while position < len(tape) or aside:
        if position < len(tape):
            current, start = tape[position], 0
            position += 1
        else:
            current, start = aside.pop()
        for k in range(start, len(edges[current])):
            if len(tape) - position >= MAX_WIDTH:
                aside.append((current, k))
                break
            source = edges[current][k]
            unread[source] -= 1
            if unread[source] == 0:
                tape.append(source)
    return [operations[i] for i in reversed(tape[1:])]
