"""Compare the time of standard tasks in nalora evaluate with mlx_lm.evaluate.

    python scripts/benchmark_lm_eval.py --model demo/model

Both run lm_eval's evaluation of the same local tasks on the same model, in one process, and take turns: 40 questions
with four continuations each, and 16 answers of up to 32 tokens. The script prints one JSON line for each task and side
with the medians of the rounds, in seconds on the clock and of all processors, and one for the ratios of the medians.
Apart from them is what nalora does once for all models: it checks that they answer in batches as they do alone.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHOICES = {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{label}}",
    "doc_to_choice": "endings",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ],
}
ANSWERS = {
    "task": "answers",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",  # the model continues the story
    "doc_to_target": "{{label}}",
    "generation_kwargs": {"until": ["The end"], "do_sample": False, "max_gen_toks": 32},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
PLACES = ("kitchen", "garden", "harbour", "library", "workshop", "station", "market", "school")
TOOLS = ("a wooden ladder", "an old lamp", "two paper bags", "a red bucket", "the broken clock")
ENDINGS = (
    "carries {} to the door and waits there until somebody opens it.",
    "puts {} on the table, sits down and looks out of the window for a while.",
    "asks a neighbour to hold {} and runs back for the keys.",
    "drops {} because it is heavier than it looked.",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a model")
    parser.add_argument("--tasks", nargs="+", choices=("choices", "answers"), default=("choices", "answers"))
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of each task and side (default: 3)"
    )
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model = str(Path(args.model).resolve())
    with tempfile.TemporaryDirectory() as directory:
        write_tasks(Path(directory))
        os.chdir(directory)  # where lm_eval looks for data files
        measure(model, Path(directory), args.tasks, args.rounds)
    return 0


def write_tasks(directory: Path) -> None:
    """Write the task files and their documents."""
    documents = []
    for place in PLACES:
        for tool in TOOLS:
            text = (
                f"The morning is cold, and the {place} is still empty. A woman in a long coat comes in, "
                f"stops, and sees {tool} next to the wall. She thinks about it for a moment. Then she"
            )
            endings = [ending.format(tool) for ending in ENDINGS]
            documents.append({"text": text, "endings": endings, "label": len(documents) % 4})
    for task, rows in ((CHOICES, documents), (ANSWERS, documents[::3] + documents[1:3])):
        data = directory / f"{task['task']}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data.name}}}
        (directory / f"{task['task']}.yaml").write_text(json.dumps(task | source | {"test_split": "test"}))


def measure(model: str, directory: Path, tasks: Sequence[str], rounds: int) -> None:
    """Measure both sides in turn and print the results."""
    import datasets
    from lm_eval.tasks import TaskManager
    from mlx_lm.evaluate import MLXLM

    from nalora_mlx.evaluate.generation import choose_batching
    from nalora_mlx.evaluate.language_model import LanguageModel

    datasets.config.HF_DATASETS_CACHE = directory / "cache"
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    theirs = MLXLM(model, use_chat_template=False)
    theirs._model.freeze()
    start = time.perf_counter()
    batching = choose_batching(theirs._model)
    print(json.dumps({"choose_batching_s": round(time.perf_counter() - start, 3)}), flush=True)
    for task in tasks:
        loaded = manager.load([task])
        times: dict[str, list[tuple[float, float]]] = {"nalora": [], "mlx_lm": []}
        results = {}
        for round_number in range(rounds + 1):
            for side in sorted(times, reverse=round_number % 2 == 1):
                start, processors = time.perf_counter(), time.process_time()
                # Made anew for each model: finding the output head and compiling count.
                ours = LanguageModel(theirs._model, theirs.tokenizer, batching=batching)
                results[side] = evaluate(theirs if side == "mlx_lm" else ours, loaded)[task]
                if round_number:  # the first one is warm-up
                    times[side].append((time.perf_counter() - start, time.process_time() - processors))
        medians = {
            side: [statistics.median(kind) for kind in zip(*rows, strict=True)]
            for side, rows in times.items()
        }
        for side, (seconds, processor_seconds) in medians.items():
            line = {
                "task": task,
                "side": side,
                "s": round(seconds, 2),
                "processor_s": round(processor_seconds, 2),
            }
            scores = {key: value for key, value in results[side].items() if "," in key and value != "N/A"}
            print(
                json.dumps(line | {"rounds_s": [round(one, 2) for one, _ in times[side]]} | scores),
                flush=True,
            )
        ratios = [one / other for one, other in zip(medians["nalora"], medians["mlx_lm"], strict=True)]
        line = {"task": task, "ratio": round(ratios[0], 3), "processor_ratio": round(ratios[1], 3)}
        print(json.dumps(line), flush=True)


def evaluate(lm: Any, loaded: Any) -> dict[str, Any]:
    """Return the results of lm_eval, without what it prints."""
    import lm_eval

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return lm_eval.evaluate(lm, loaded, bootstrap_iters=0)["results"]


if __name__ == "__main__":
    sys.exit(main())
