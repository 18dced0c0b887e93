"""Train on the example of preference training with each loss and three seeds, and compare answers before and after.

    bash scripts/environment.sh python scripts/preference_study.py --output docs/study/preference.jsonl

1. The test pairs are scored under the base model: how often has the chosen answer the higher log-probability per token?
2. Each recipe of `RECIPES` trains with seeds 0, 1 and 2, on the settings of examples/manners/config.yaml and its own.
3. The test pairs are scored again. A pair is right if log p - log p_0 is larger for the chosen answer than for the
   rejected one, where log p_0 is that of the base model: DPO's accuracy. Then the model answers test prompts, greedily.

DPO's rate and some phrases of the data were chosen with seed 0 after a look at test pairs of earlier drafts, so its
figures flatter a little. Each run appends a line of JSON to the output; runs that are in it already are skipped.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx import finetune
from nalora_mlx.core.config import PreferenceConfig, load_run_config
from nalora_mlx.core.yaml_files import read_yaml
from nalora_mlx.data.batches import evaluation_batches
from nalora_mlx.data.checks import read_rows, tokenize
from nalora_mlx.training.distributed import ALONE
from nalora_mlx.training.preferences.loss import PreferenceLoss
from nalora_mlx.training.preferences.reference import row_log_probabilities

EXAMPLE = Path("examples/manners")
SEEDS = (0, 1, 2)
ASKED = 20  # test prompts that are answered
SHOWN = 5  # of them, whose answers are kept
MAX_TOKENS = 80
COURTESY = re.compile(
    r"of course|gladly|pleasure|certainly|thank|good question|hope|please|welcome|good luck|happy to|delighted|"
    r"lovely|kindly",
    re.I,
)


@dataclass(frozen=True)
class Recipe:
    """A way to train: its settings on top of those of the example, and the recipe whose adapter it starts from."""

    settings: dict[str, Any] = field(default_factory=dict)
    after: str | None = None


RECIPES = {
    "dpo": Recipe(),
    "sft": Recipe({"train_mode": "sft", "learning_rate": 4e-4, "mask_prompt": True}),
    "sft, dpo": Recipe({"learning_rate": 1e-4}, after="sft"),
    "orpo": Recipe({"train_mode": "orpo", "learning_rate": 4e-4, "mask_prompt": True}),
    "simpo": Recipe({"train_mode": "simpo"}),
    "kto": Recipe({"train_mode": "kto", "batch_size": 8}),
}


def read(split: str) -> list[dict[str, Any]]:
    lines = (EXAMPLE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def rows_for(mode: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of a split: pairs, or for supervised training the chosen answers alone."""
    if mode != "sft":
        return read(split)
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in read(split)]


# --- scores -------------------------------------------------------------------------------------------------


class TestPairs:
    """The test pairs, tokenized, and their log-probabilities under the base model."""

    def __init__(self, model: str):
        from mlx_lm import load

        self.config = load_run_config(EXAMPLE / "config.yaml", {"model": model, "test": True})
        base, tokenizer = load(model)
        self.pairs = tokenize(read_rows(self.config, ("test",)), tokenizer, 1024)["test"].sequences
        self.lengths = np.array([[sum(a.loss_mask) for a in pair.answers] for pair in self.pairs])
        self.prompts = list(dict.fromkeys(row["prompt"] for row in read("test")))[:ASKED]
        self.base = self.log_probabilities(base)
        self.model, self.tokenizer = base, tokenizer

    def log_probabilities(self, model: Any) -> np.ndarray:
        """Return log p of the chosen and the rejected answer of each pair; [N, 2]."""
        model.eval()
        batches = evaluation_batches(self.pairs, 4, -1, 0, ALONE.share)
        loss = PreferenceLoss(model, PreferenceConfig(train_mode="dpo"))
        return row_log_probabilities(loss, self.pairs, batches, ALONE)

    def scores(self, log_p: np.ndarray) -> dict[str, Any]:
        """Return the share of pairs that are right, by ratio to the base model and by log p, and the margin."""
        ratios, per_token = log_p - self.base, log_p / self.lengths
        return {
            "accuracy": right(ratios),
            "accuracy_per_token": right(per_token),
            "margin": float(np.mean(ratios[:, 0] - ratios[:, 1])),
            "chosen_logp": float(np.mean(per_token[:, 0])),
            "rejected_logp": float(np.mean(per_token[:, 1])),
            "wrong": [pair.source for pair, (w, l_) in zip(self.pairs, ratios, strict=True) if w < l_],
        }

    def answers(self, model: Any, tokenizer: Any) -> list[str]:
        """Return greedy answers to the first test prompts."""
        from mlx_lm import batch_generate

        chats = [[{"role": "user", "content": prompt}] for prompt in self.prompts]
        tokens = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            for chat in chats
        ]
        return [
            text.strip() for text in batch_generate(model, tokenizer, tokens, max_tokens=MAX_TOKENS).texts
        ]


def right(values: np.ndarray) -> float:
    """Return the share of rows whose first value is larger; equal ones count half."""
    difference = values[:, 0] - values[:, 1]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def manners(answers: Sequence[str]) -> dict[str, float]:
    """Return the mean number of words of answers (which end at MAX_TOKENS), and the share with a courteous word."""
    return {
        "words": statistics.mean(len(answer.split()) for answer in answers),
        "courteous": statistics.mean(bool(COURTESY.search(answer)) for answer in answers),
    }


# --- runs ---------------------------------------------------------------------------------------------------


def run(name: str, seed: int, pairs: TestPairs, directory: Path) -> dict[str, Any]:
    """Train once, score and answer. Return the record of the run."""
    recipe = RECIPES[name]
    path = directory / f"{name}-{seed}".replace(", ", "-")
    settings = {"seed": seed, **recipe.settings}
    if recipe.after is not None:
        start = directory / f"{recipe.after}-{seed}"
        if not start.exists():
            run(recipe.after, seed, pairs, directory)
        settings["resume_adapter_file"] = str(start)
    given = {**read_yaml(EXAMPLE / "config.yaml"), **settings}
    for key in ("model", "data", "train", "adapter_path"):
        del given[key]
    began = time.perf_counter()
    data = {split: rows_for(given["train_mode"], split) for split in ("train", "valid")}
    result = finetune(pairs.config.model, data, path, progress=False, samples=False, **given)
    seconds = time.perf_counter() - began
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    valid = [record for record in map(json.loads, lines) if record["split"] == "valid"]
    answers = pairs.answers(result.model.eval(), result.tokenizer)
    return {
        "recipe": name,
        "seed": seed,
        "settings": {key: given[key] for key in ("train_mode", "learning_rate", "iters", "batch_size")},
        "valid": {when: measures(record) for when, record in (("before", valid[0]), ("after", valid[-1]))},
        "test": pairs.scores(pairs.log_probabilities(result.model)) | manners(answers),
        "answers": dict(zip(pairs.prompts, answers[:SHOWN], strict=False)),
        "seconds": round(seconds, 1),
    }


def measures(record: dict[str, Any]) -> dict[str, float]:
    names = ("loss", "accuracy", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp", "kl")
    return {name: record[name] for name in names if name in record}


def rounded(value: Any) -> Any:
    """Round floats to five digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(records: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| recipe | seed | accuracy | per token | margin | KL | validation loss | words | courteous | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        test, valid = record["test"], record.get("valid")
        loss = f"{valid['before']['loss']:.3f} → {valid['after']['loss']:.3f}" if valid else ""
        kl = f"{valid['after']['kl']:.2f}" if valid and "kl" in valid["after"] else ""
        lines.append(
            f"| {record['recipe']} | {record['seed']} | {test['accuracy']:.2f} | {test['accuracy_per_token']:.2f} "
            f"| {test['margin']:.1f} | {kl} | {loss} | {test['words']:.0f} | {test['courteous']:.0%} "
            f"| {record['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument(
        "--output", type=Path, required=True, help="file of results; is continued if it exists"
    )
    args = parser.parse_args()
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.exists() else []
    records = [json.loads(line) for line in lines]
    done = {(record["recipe"], record["seed"]) for record in records}

    def add(record: dict[str, Any]) -> None:
        records.append(rounded(record))
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(records[-1]) + "\n")

    pairs = TestPairs(args.model)
    if ("base", 0) not in done:
        before = pairs.answers(pairs.model, pairs.tokenizer)
        shown = dict(zip(pairs.prompts, before[:SHOWN], strict=False))
        test = pairs.scores(pairs.base) | manners(before)
        add({"recipe": "base", "seed": 0, "test": test, "answers": shown, "seconds": 0})
    with tempfile.TemporaryDirectory() as directory:
        for seed in args.seeds:
            for name in args.recipes:
                if (name, seed) not in done:
                    add(run(name, seed, pairs, Path(directory)))
                    print(table(records[-1:]), file=sys.stderr, flush=True)
                    mx.clear_cache()
    order = ["base", *RECIPES]
    print(table(sorted(records, key=lambda record: (order.index(record["recipe"]), record["seed"]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
