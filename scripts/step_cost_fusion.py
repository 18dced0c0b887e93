"""What mx.compile makes of a traced graph: which elementwise operations it fuses into one kernel.

MLX exports graphs before fusion, so the rules of mlx/compile.cpp (MLX 0.32) are applied here: elementwise operations
that follow one another become one kernel, at most eleven in a row and with fewer than 24 inputs, if nothing else reads
the values between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nalora_mlx.training.traced_graph import Array, Operation, TracedGraph

MAX_DEPTH, MAX_INPUTS = 11, 24
FUSED = "Compiled"
ELEMENTWISE = frozenset(
    (
        *("Abs", "Add", "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTan2", "ArcTanh", "AsType"),
        *("BitwiseBinary", "BitwiseInvert", "Ceil", "Conjugate", "Cos", "Cosh", "Divide", "Equal", "Erf"),
        *("ErfInv", "Exp", "Expm1", "Floor", "Greater", "GreaterEqual", "Imag", "Less", "LessEqual", "Log"),
        *("Log1p", "LogAddExp", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Multiply"),
        *("Negative", "NotEqual", "Power", "Real", "Remainder", "Round", "Select", "Sigmoid", "Sign", "Sin"),
        *("Sinh", "Sqrt", "Square", "Subtract", "Tan", "Tanh"),
    )
)
BROADCAST = "Broadcast"


@dataclass(eq=False)
class Node:
    """An operation in a graph that is being rewritten."""

    kind: str
    arguments: tuple[object, ...]
    inputs: list[Array]
    outputs: list[Array]
    parts: list[Operation] = field(default_factory=list)  # of a fused operation, in order

    @property
    def output(self) -> Array:
        """The only or the last output."""
        return self.outputs[-1]


def fuse(graph: TracedGraph) -> list[Operation]:
    """Return the operations of a graph after mx.compile, in the order in which it leaves them."""
    nodes = [Node(o.kind, o.arguments, list(o.inputs), list(o.outputs)) for o in graph.operations]
    outputs = {array.name for array in graph.outputs}
    nodes = _merge_equal(nodes, outputs)
    return [_operation(node) for node in _Fusion(nodes, outputs).run()]


def _operation(node: Node) -> Operation:
    arguments = tuple(node.parts) if node.kind == FUSED else node.arguments
    return Operation(node.kind, arguments, tuple(node.inputs), tuple(node.outputs))


def _merge_equal(nodes: list[Node], outputs: set[str]) -> list[Node]:
    """Keep one of equal operations on the same inputs, and drop operations whose results nobody reads."""
    kept, first, same = [], dict[object, Node](), dict[str, Array]()
    for node in nodes:
        node.inputs = [same.get(a.name, a) for a in node.inputs]
        key = (node.kind, repr(node.arguments), *(a.name for a in node.inputs), node.output.dtype)
        other = first.get(key)
        # Without inputs, as arange, MLX does not compare; random bits are never equal.
        if other is None or not node.inputs or any(a.name in outputs for a in node.outputs):
            first.setdefault(key, node)
            kept.append(node)
        else:
            same |= {a.name: b for a, b in zip(node.outputs, other.outputs, strict=True)}
    result = list[Node]()
    read = set(outputs)
    for node in reversed(kept):
        if any(a.name in read for a in node.outputs):
            read |= {a.name for a in node.inputs}
            result.append(node)
    return result[::-1]


def _readers(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for array in node.inputs:
            readers.setdefault(array.name, []).append(node)
    return readers


class _Fusion:
    """One pass of fusion, from the last operation to the first."""

    def __init__(self, nodes: list[Node], outputs: set[str]):
        self.nodes, self.outputs = nodes, outputs
        self.producer = {a.name: node for node in nodes for a in node.outputs}
        self.readers = _readers(nodes)
        self.copies = 0

    def run(self) -> list[Node]:
        """Return the nodes after fusion."""
        result, inside = list[Node](), set[int]()
        for node in reversed(self.nodes):
            if id(node) in inside:
                continue
            section = self._section(node) if node.kind in ELEMENTWISE else []
            if len(section) > 1:
                inside |= {id(part) for part in section}
                node = self._fused(node, section)
            result.append(node)
        return result[::-1]

    def _section(self, root: Node) -> list[Node]:
        """Return the nodes that are computed together with an elementwise one, each after its inputs."""
        section: dict[int, Node] = {}
        inputs = set[str]()

        def visit(array: Array, reader: Node | None, depth: int) -> None:
            node = self.producer.get(array.name)
            if node is not None and id(node) in section:
                return
            fusable = node is not None and (node.kind in ELEMENTWISE or node.kind == BROADCAST)
            other_shape = array.name in self.outputs and array.shape != root.output.shape
            if depth >= MAX_DEPTH or node is None or not fusable or other_shape:
                inputs.add(array.name)
                return
            if depth and not all(id(r) in section for r in self.readers[array.name]):
                if node.kind == BROADCAST and len(inputs) < MAX_INPUTS:
                    visit(self._split(node, section), reader, depth)
                else:
                    inputs.add(array.name)
                return
            if array.name in self.outputs:
                inputs.add(array.name)
            else:
                inputs.discard(array.name)
            if len(inputs) >= MAX_INPUTS:
                return
            section[id(node)] = node
            for i in range(len(node.inputs)):
                visit(node.inputs[i], node, depth + 1)

        visit(root.output, None, 0)
        return self._in_order(root, section)

    def _in_order(self, root: Node, section: dict[int, Node]) -> list[Node]:
        ordered, seen = list[Node](), set[int]()

        def visit(node: Node) -> None:
            if id(node) in seen:
                return
            seen.add(id(node))
            for array in node.inputs:
                below = self.producer.get(array.name)
                if below is not None and id(below) in section:
                    visit(below)
            ordered.append(node)

        if section:
            visit(root)
        return ordered

    def _split(self, node: Node, section: dict[int, Node]) -> Array:
        """Give the readers inside a section a copy of a broadcast that others read too."""
        self.copies += 1
        array = node.output
        copy = array._replace(name=f"{array.name}+{self.copies}")
        other = Node(node.kind, node.arguments, list(node.inputs), [copy])
        self.producer[copy.name] = other
        inside = [r for r in self.readers[array.name] if id(r) in section]
        self.readers[copy.name] = inside
        self.readers[array.name] = [r for r in self.readers[array.name] if id(r) not in section]
        for reader in inside:
            reader.inputs = [copy if a.name == array.name else a for a in reader.inputs]
        for source in node.inputs:
            self.readers[source.name].append(other)
        return copy

    def _fused(self, root: Node, section: list[Node]) -> Node:
        computed = {a.name for node in section for a in node.outputs}
        inputs = list({a.name: a for n in section for a in n.inputs if a.name not in computed}.values())
        results = [n.output for n in section[:-1] if n.output.name in self.outputs] + [root.output]
        node = Node(FUSED, (), inputs, results, [_operation(part) for part in section])
        ids = {id(part) for part in section}
        for array in (*inputs, *results):
            others = [r for r in self.readers.get(array.name, []) if id(r) not in ids]
            self.readers[array.name] = others + ([node] if array in inputs else [])
        for array in results:
            self.producer[array.name] = node
        return node
