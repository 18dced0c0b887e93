"""Translation of Metal kernels to C++, and checks of rules of Metal that no C++ compiler knows."""

import re
from dataclasses import dataclass

SPACES = r"(?:device|constant|threadgroup|thread)"
TYPE = r"[\w:]+(?:\s*<[^<>]*>)?"
SHARED = re.compile(rf"\bthreadgroup\s+({TYPE})\s+(\w+)((?:\s*\[[^\]]+\])*)\s*;")
SHARED_LEFT = re.compile(rf"\bthreadgroup\s+{TYPE}\s+\w+\s*[\[,=;]")
NUMBER = r"(?:float|half|bfloat|bfloat16_t|float16_t|u?(?:int|short|char|long)|u?int\d+_t|bool|size_t)[234]?"
LACKING = (
    r"\bdouble\b|\bstd\s*::|\b(?:goto|new|delete|noexcept|register|virtual|throw|try|catch|typeid|dynamic_cast"
    r"|thread_local)\b"
)
LAMBDA = r"(?<!operator)\[\s*[&=]?\s*\]\s*\("
POINTER_CAST = rf"\(\s*(?:const\s+)?{SPACES}\b[^()]*\*\s*\)"


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel. `attribute` is buffer(N), or the name of a thread position."""

    type: str
    name: str
    attribute: str


def signature(source: str) -> tuple[str, list[Parameter]]:
    """Return the kernel's name and parameters from source in the form that MLX writes."""
    match = re.search(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", source, re.S)
    if not match:
        raise ValueError(f"no kernel in this text:\n{source[:200]}")
    rows = re.findall(r"^  (.*?[*&]?) (\w+) \[\[(.*?)\]\]", match[2], re.M)
    return match[1], [Parameter(*row) for row in rows]


def waits(source: str) -> bool:
    """Return whether the kernel's threads wait for one another."""
    return bool(
        re.search(r"\b(?:threadgroup_barrier|simdgroup_barrier|simd_\w+)\s*\(", without_comments(source))
    )


def program(source: str) -> str:
    """Return C++ source for g++: the kernel, and `msl_call`, which runs it for one thread."""
    name, parameters = signature(source)
    instance = re.search(r"decltype\((.*)\) ", source)
    arguments = ",\n      ".join(map(argument, parameters))
    return "\n".join(
        [
            '#include "shim.h"',
            '#include "ids.h"',
            '#line 1 "kernel.metal"',
            share(source),
            '#line 1 "call.cc"',
            f'extern "C" {{ extern const int msl_waits = {waits(source):d}; }}',
            'extern "C" void msl_call(void** buffers, const msl::Ids* ids) {',
            f"  {instance[1] if instance else name}(\n      {arguments});",
            "}",
            "",
        ]
    )


def argument(parameter: Parameter) -> str:
    """Return the expression that `msl_call` passes for a parameter."""
    buffer = re.fullmatch(r"buffer\((\d+)\)", parameter.attribute)
    if buffer:
        pointer = f"static_cast<{parameter.type.rstrip('*& ')}*>(buffers[{buffer[1]}])"
        return "*" + pointer if parameter.type.endswith("&") else pointer
    position = f"ids->{parameter.attribute}"
    if parameter.type == "uint3":
        return f"uint3({position}.x, {position}.y, {position}.z)"
    return position


def syntax(source: str) -> str:
    """Return the kernel alone, for clang with address spaces."""
    # Native vectors have no constructors, and template instantiations take no attributes.
    source = re.sub(r"^template \[\[host_name.*?\]\] \[\[kernel\]\] ", "template ", source, flags=re.M)
    source = re.sub(r"\[\[(?:kernel|max_total_threads_per_threadgroup\(.*?\))\]\]", "", source)
    source = re.sub(r"\b((?:float|half|bfloat|u?int)[234]|vec<[^<>]*>)\s*\(", r"msl::make<\1>(", source)
    source = re.sub(r" \[\[.*?\]\]", "", source)
    return "\n".join(['#include "shim.h"', '#line 1 "kernel.metal"', share(source), ""])


def share(source: str) -> str:
    """Rewrite declarations of threadgroup memory as references to memory from the runtime."""
    keys = iter(range(len(source)))
    return SHARED.sub(lambda m: f'auto& {m[2]} = msl::shared<{m[1]}{m[3]}>({next(keys)}, "{m[2]}");', source)


def without_comments(source: str) -> str:
    """Return the source with comments, strings and preprocessor lines blanked, keeping line numbers."""
    blank = re.compile(r'//[^\n]*|/\*.*?\*/|"[^"\n]*"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*', re.S | re.M)
    return blank.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), source)


def violations(source: str) -> list[str]:
    """Return messages `kernel.metal:LINE: ...` about code that C++ accepts and Metal rejects."""
    text = without_comments(source)
    found = [(m, "Metal has no `{}`") for m in re.finditer(LACKING, text)]
    found += [(m, "Metal has no lambda expressions") for m in re.finditer(LAMBDA, text)]
    found += [(m, "write the cast `{}` as a reinterpret_cast") for m in re.finditer(POINTER_CAST, text)]
    found += [(m, "a pointer or reference needs an address space: `{}`") for m in bare_pointers(text)]
    shared = {m.start(): m for m in SHARED.finditer(text)}
    left = [m for m in SHARED_LEFT.finditer(text) if m.start() not in shared]
    found += [(m, "declare one threadgroup variable per statement, without a value: `{}`") for m in left]
    outside = [m for at, m in shared.items() if at < text.find("[[kernel]]")]
    found += [(m, "a threadgroup variable must be declared in the kernel itself: `{}`") for m in outside]
    rows = [(m.start(), message.format(m[0].strip())) for m, message in found]
    rows += program_variables(text) + bare_members(text)
    return [f"kernel.metal:{text.count(chr(10), 0, at) + 1}: {message}" for at, message in sorted(rows)]


def bare_pointers(text: str) -> list[re.Match]:
    """Find pointers and references without an address space."""
    names = re.findall(r"\b(?:typename|class|struct)\s+(\w+)", text)
    types = "|".join([NUMBER, r"vec\s*<[^<>]*>", *names])
    pattern = rf"(?:\b(?:const|{SPACES})\s+)*(?<!\w)(?:metal::)?(?:{types})(?:\s+const)?\s*[*&](?!&)"
    return [m for m in re.finditer(pattern, text) if not re.search(rf"\b{SPACES}\b", m[0])]


def bare_members(text: str) -> list[tuple[int, str]]:
    """Return position and message for member functions without an address space (generic in Metal 4.1)."""
    return [
        (at, f"a member function needs an address space after its parameters: `{' '.join(member.split())}`")
        for kind in re.finditer(r"\b(?:struct|class|union)\b[^;{}()]*\{", text)
        for at, member in members(text, kind.end())
        if is_bare(member)
    ]


def is_bare(member: str) -> bool:
    """Return whether the text of a member, without its body, declares a function without an address space."""
    member = re.sub(r"\boperator\s*(?:\(\s*\)|[^\w\s(]+)", "operator", member)
    while (shorter := re.sub(r"<[^<>()]*>", "", re.sub(r"\([^()]*\)", "@", member))) != member:
        member = shorter
    head = re.split(r"(?<!:):(?!:)", member)[0]  # without the initializers of a constructor
    function = re.match(r"([^=]*?)\w+\s*@\s*(?:const\s*)?(?:=\s*\w+\s*)?$", head.lstrip())
    return bool(function) and not re.search(r"\b(?:static|friend|using|typedef)\b", function[1])


def members(text: str, start: int) -> list[tuple[int, str]]:
    """Return position and text of the members of a type, without bodies, given where its own body starts."""
    found, depth, at = [], 0, start
    for i in range(start, len(text)):
        if text[i] == "}":
            depth -= 1
            at = i + 1
            if depth < 0:
                break
        elif text[i] in "{;":
            if depth == 0:
                found.append((at + len(text[at:i]) - len(text[at:i].lstrip()), text[at:i]))
                at = i + 1
            depth += text[i] == "{"
    return found


def program_variables(text: str) -> list[tuple[int, str]]:
    """Return position and message for variables outside of functions that are not `constant`."""
    return [
        (at, f"a variable outside of functions must be `constant`: `{statement.strip()}`")
        for at, statement in outer_statements(text)
        if has_value(statement) and not re.search(r"^\s*(?:using|typedef)\b|\bconstant\b", statement)
    ]


def has_value(statement: str) -> bool:
    """Return whether a statement assigns a value to a variable; default arguments do not count."""
    while (shorter := re.sub(r"<[^<>]*>|\([^()]*\)", "", statement)) != statement:
        statement = shorter
    return bool(re.search(r"(?<!operator)(?<![=!<>+*/-])=(?!=)", statement))


def outer_statements(text: str) -> list[tuple[int, str]]:
    """Return position and text of all statements outside of braces, except braces of namespaces."""
    statements: list[tuple[int, str]] = []
    depth, start, current = 0, 0, ""
    for at, character in enumerate(text):
        if character == "{":
            namespace = depth == 0 and re.search(r"\bnamespace\b[^;={}]*$", current)
            current = "" if namespace else current
            depth += not namespace
        elif character == "}":
            depth = max(depth - 1, 0)
            if depth == 0 and not has_value(
                current
            ):  # the end of a function or type, not of a list of values
                current = ""
        elif character == ";" and depth == 0:
            statements.append((start, current))
            current = ""
        elif depth == 0 and (current or not character.isspace()):
            start = start if current else at
            current += character
    return statements
