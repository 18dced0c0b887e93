"""Synthetic results of `nalora evaluate`, with known values."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from nalora_mlx.adapters.merge_record import adapter_digest
from nalora_mlx.runs.evaluations import evaluation_file, run_of, write_evaluation
from tests.report.report_runs import write_run

NATS, SHARE = "nats per token", "share"


def measure(
    name: str,
    base: tuple | None,
    tuned: tuple | None,
    difference: tuple | None = None,
    told: str = "",
    *,
    title: str | None = None,
    part: str = "test",
    unit: str = NATS,
    p: float | None = None,
) -> dict[str, Any]:
    """Return a measure as JSON. Values are (value, low, high)."""
    entry = {"name": name, "title": title or name, "part": part, "unit": unit, "base": base, "tuned": tuned}
    if difference is not None:
        entry |= {"difference": difference, "told": told, "p": p, "better": 3, "worse": 1, "rows": 14}
        entry |= {"lower_is_better": unit == NATS, "words": "no difference can be told with 14 rows"}
    return entry


def measures() -> list[dict[str, Any]]:
    """Return measures of each kind."""
    return [
        measure("loss", (2.31, 2.2, 2.4), (1.04, 0.9, 1.1), (-1.27, -1.4, -1.1), "better"),
        measure(
            "exact",
            (0.07, 0, 0.2),
            (0.64, 0.4, 0.8),
            (0.57, 0.3, 0.8),
            "better",
            title="exact match",
            unit=SHARE,
            p=0.008,
        ),
        measure("f1", (0.41, 0.3, 0.5), (0.44, 0.3, 0.6), (0.03, -0.1, 0.1), title="token F1", unit="score"),
        measure(
            "general_loss",
            (2.9, 2.7, 3.1),
            (3.15, 2.9, 3.4),
            (0.25, 0.2, 0.3),
            "worse",
            title="loss",
            part="general",
        ),
        measure("kl", None, (0.17, 0.1, 0.2), title="KL(base || tuned)", part="general"),
    ]


def answer(prompt: str, expected: str | None, base: str, tuned: str, complete: bool = True) -> dict[str, Any]:
    """Return the record of a question that both models answered."""
    texts = {
        name: {"text": text, "complete": complete, "values": {"exact": float(text == expected)}}
        for name, text in (("base", base), ("tuned", tuned))
    }
    return {"source": "test.jsonl:1", "prompt": prompt, "expected": expected, **texts}


def evaluation(name: str, digest: str | None, data: str | None = "data", **changes: Any) -> dict[str, Any]:
    """Return a result about an adapter. `changes` replace entries of the adapter, or of the result."""
    adapter = {
        "name": name,
        "digest": digest,
        "measures": measures(),
        "warning": None,
        "answers": [],
        "metric": None,
        "changed": {"better": [], "worse": []},
        "changed_choices": {"better": [], "worse": []},
    }
    content = {
        "format": 1,
        "created": "2026-03-01T12:00:00+01:00",
        "version": "1.0",
        "model": "a/model",
        "data": data,
        "split": "test",
        "rows": 14,
        "of": 14,
        "max_tokens": 64,
        "passages": 40,
        "base": [],
    }
    content |= {key: value for key, value in changes.items() if key not in adapter}
    adapter |= {key: value for key, value in changes.items() if key in adapter}
    return content | {"adapters": [adapter]}


def write_evaluations(run: Path, data: dict[str, str | None], **changes: Any) -> None:
    """Write results about adapters of a run.

    Args:
        run: directory, in which the adapters are.
        data: directory of an adapter in the run -> name of the test set.
        changes: see `evaluation`.
    """
    for part, name in data.items():
        adapter = run / part
        of = run_of(adapter)[1]
        digest = adapter_digest(adapter / "adapters.safetensors")
        content = evaluation(f"{run.name}/{of}" if of else run.name, digest, name, **changes)
        write_evaluation(evaluation_file(adapter, name, "test"), content)


def evaluated_run(path: Path, data: str | None = "data", **changes: Any) -> Path:
    """Write a run with an adapter and a result about it; see `evaluation`."""
    write_run(path)
    mx.save_safetensors(str(path / "adapters.safetensors"), {"a.lora_b": mx.ones((2, 3))})
    write_evaluations(path, {"": data}, **changes)
    return path
