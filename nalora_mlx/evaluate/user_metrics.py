"""Metrics that the user writes: a function in a Python file."""

import contextlib
import inspect
import itertools
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.core.parsing import nearest
from nalora_mlx.evaluate.metrics import Metric, MetricError

__all__ = ["check", "load_user_metric"]

_numbers = itertools.count(1)  # of the files imported so far


def load_user_metric(text: str) -> Metric:
    """Return the metric that a function in a Python file computes.

    The function takes (answer, expected) or (answer, expected, row) and returns a finite number, True or False. It gets
    the row if its third parameter is called `row` or has no default. The metric is binary if the function is annotated
    with `-> bool`. The file is run once, under a name of its own. It can import modules of its folder, though not later
    from inside a function, and no .pyc files are written there.

    Args:
        text: FILE.py:FUNCTION.

    Raises:
        InputError: there is no such file or function, importing the file raises, or the function takes other
            parameters.
    """
    file, _, name = text.rpartition(":")
    if not file or not name.isidentifier():
        raise InputError(f"{text!r} is no metric of your own; write FILE.py:FUNCTION, as in metrics.py:score")
    path = Path(file).expanduser()
    function = _function(_import(path), name, path)
    signature = _signature(function, text)
    takes_row = _takes_row(signature, text)

    def score(answer: str, expected: str, row: Mapping[str, Any]) -> float:
        where = f"{text} on {row['source']}" if row.get("source") else text
        try:
            value = function(answer, expected, row) if takes_row else function(answer, expected)
        except (Exception, SystemExit) as error:
            raise MetricError(f"{where}: raises {_described(error, path)}") from error
        number = _number(value, where)
        if is_binary and number not in (0, 1):
            raise MetricError(
                f"{where}: returns {number:g}, and is annotated with -> bool; remove the annotation"
            )
        return number

    is_binary = signature.return_annotation in (bool, "bool")
    return Metric(text, name.strip("_").replace("_", " ") or name, True, is_binary, score)


def check(metric: Metric, rows: Iterable[Mapping[str, Any]]) -> None:
    """Compute a metric of expected answers, as if the model had given them, to find mistakes before one is loaded.

    Args:
        metric: the metric.
        rows: with "expected" and whatever else the metric reads. Rows without an expected answer are skipped.

    Raises:
        MetricError: the metric fails on a row.
    """
    for row in rows:
        if isinstance(expected := row.get("expected"), str):
            metric.score(expected, expected, row)


# --- loading ------------------------------------------------------------------------------------------------


def _import(path: Path) -> ModuleType:
    """Run a Python file as a module of its own name."""
    if path.suffix != ".py":
        raise InputError(f"{path}: a metric of your own is in a Python file, which ends in .py")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a file of metrics ({error.strerror})") from None
    module = ModuleType(f"nalora_user_metrics_{next(_numbers)}")
    module.__file__ = str(path.absolute())
    try:
        code = compile(source, module.__file__, "exec", dont_inherit=True)
    except SyntaxError as error:
        line = f"line {error.lineno}: " if error.lineno else ""
        raise InputError(f"{path}: {line}not Python: {error.msg}") from None
    except ValueError as error:  # a null byte
        raise InputError(f"{path}: not Python: {first_line(error)}") from None
    sys.modules[module.__name__] = module  # dataclasses look it up
    try:
        with _folder_importable(path.absolute().parent):
            exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise InputError(f"{path}: importing it raises {_described(error, path)}") from error
    return module


@contextlib.contextmanager
def _folder_importable(folder: Path) -> Iterator[None]:
    """Let modules of a folder be imported, without .pyc files beside them."""
    entry, writes_none = str(folder), sys.dont_write_bytecode
    sys.path.insert(0, entry)
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_none
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _function(module: ModuleType, name: str, path: Path) -> Callable[..., Any]:
    """Return the function of a name in a module."""
    known = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    if not hasattr(module, name):
        hint = nearest(name, known) if known else "; it defines no function"
        raise InputError(f"{path}: has no function {name!r}{hint}")
    function = getattr(module, name)
    if not callable(function):
        hint = nearest(name, known) if known else ""
        raise InputError(f"{path}: {name!r} is no function but {type(function).__name__}{hint}")
    return function


def _signature(function: Callable[..., Any], text: str) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        raise InputError(
            f"{text}: its parameters are unknown; wrap it in a function that you define"
        ) from None


def _takes_row(signature: inspect.Signature, text: str) -> bool:
    """Return whether a function takes the row too; raise InputError if it cannot be called."""
    positional = [
        p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    takes_row = len(positional) > 2 and (
        positional[2].default is inspect.Parameter.empty or positional[2].name == "row"
    )
    try:
        signature.bind(*range(3 if takes_row else 2))
    except TypeError:
        names = ", ".join(map(str, signature.parameters.values()))
        raise InputError(
            f"{text}: takes ({names}); it must take (answer, expected) or (answer, expected, row)"
        ) from None
    return takes_row


# --- values -------------------------------------------------------------------------------------------------


def _number(value: Any, where: str) -> float:
    """Return what a function returned as a number."""
    number = None
    if not isinstance(value, str | bytes | bytearray):
        with contextlib.suppress(Exception):  # each library of arrays raises its own
            number = float(value)
    if number is None:
        raise MetricError(f"{where}: returns {type(value).__name__}, not a number, True or False")
    if not math.isfinite(number):
        raise MetricError(f"{where}: returns {number}, which has no mean; return a finite number")
    return number


def _described(error: BaseException, path: Path) -> str:
    """Return the type and message of an exception, and the last line of the user's file that led to it."""
    file = str(path.absolute())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    message = first_line(error)
    what = type(error).__name__ + ("" if message == type(error).__name__ else f": {message}")
    return f"{what} (line {lines[-1]})" if lines else what
