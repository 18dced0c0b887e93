"""The study: controls, the search for learning rates, scores against generation, tables of known numbers."""

import argparse
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from nalora_mlx import adapt
from nalora_mlx.data.tokenization import Example
from nalora_mlx.models.output_head import find_output_head
from nalora_mlx.training.loss import batch_arrays
from tests.conftest import VOCABULARY, build_examples, build_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import study
import study_methods
import study_tables
import study_tasks
import study_tolerance
import time_to_quality

Q = mx.array([[0.5, 2.0, 1.0, 0.1], [3.0, 0.2, 0.4, 0.4]])


def arguments(**changes):
    defaults = {
        "models": ["m"],
        "tasks": ["t"],
        "methods": ["lora"],
        "seeds": [0, 1],
        "rate": 4e-3,
        "spacing": 2,
        "iters": 10,
        "rank": 4,
        "evaluations": 4,
        "multiples": [1.0],
    }
    return argparse.Namespace(**defaults | changes)


def record(method, seed, loss, rate=1e-3, **more):
    setting = study.Setting("m", "t", method, rate, seed, 10, 4, False)
    valid = {"loss": loss, "exact": 0.5}
    return {**vars(setting), "key": setting.key, "valid": valid, "kl": 1.0, "curve": []} | more


# --- controls -----------------------------------------------------------------------------------------------


def test_controls_preserve_what_they_should():
    random = np.array(study_methods.control_multiplier(Q, "random", 3))
    assert np.array_equal(np.sort(random), np.sort(np.array(Q)))
    assert np.array_equal(random, np.array(study_methods.control_multiplier(Q, "random", 3)))
    assert not np.array_equal(random, np.array(study_methods.control_multiplier(Q, "random", 4)))
    inverse = np.array(study_methods.control_multiplier(Q[:1], "inverse", 0))
    assert np.allclose(inverse, [[1.0, 0.1, 0.5, 2.0]])
    for control, power in (("mean", 1), ("rms", 2)):
        matched = np.array(study_methods.control_multiplier(Q, control, 0))
        assert matched.shape == Q.shape
        assert np.ptp(matched, axis=-1).max() == 0
        assert np.allclose((matched**power).mean(-1), (np.array(Q) ** power).mean(-1))


@pytest.mark.parametrize("name", ["matched-mean", "matched-rms", "gate-x2"])
def test_a_constant_gate_multiplier_differs_from_lora(name):
    method = study_methods.METHODS[name]
    s = mx.array([0.1, 0.2, 1.0, 0.4])
    state = study_methods.importance.LayerState(s, mx.array(1.0), s / mx.mean(s))
    settings = study.NALoRAConfig(**dict(method.na) | {"beta": 0.0})
    with study_methods.apply_control(method.control, 0):
        q = np.array(study_methods.importance.multiplier(state, settings))
    assert np.ptp(q) < 1e-6
    assert abs(q[0] - 1) > 0.05


def test_bad_input_is_refused_before_any_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").touch()
    good = ["--models", str(tmp_path), "--tasks", "orders", "--output", str(tmp_path / "runs.jsonl")]
    for flags, message in (
        (["--iters", "30"], "multiple of"),
        (["--models", str(tmp_path / "none")], "no config.json found"),
        (["--tasks", "order"], "invalid choice"),
        (["--tasks", "wikisql", "--data", str(tmp_path)], "is missing"),
    ):
        monkeypatch.setattr(sys, "argv", ["study.py", "tune", *good, *flags])
        with pytest.raises(SystemExit) as end:
            study.main()
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_control_ends_with_its_run():
    before = study_methods.importance.multiplier, study_methods.step.gated_mlps
    for control in ("random", "first-half"):
        with study_methods.apply_control(control, 0):
            assert (study_methods.importance.multiplier, study_methods.step.gated_mlps) != before
        assert (study_methods.importance.multiplier, study_methods.step.gated_mlps) == before


def test_a_fitted_lora_a_spans_the_gradient():
    model, examples = build_model(), build_examples(40)
    batches = list(
        itertools.islice(study_methods.training_batches(examples, 4, 1), study_methods.FIT_BATCHES)
    )
    full = build_model()
    loss = study_methods.SupervisedLoss(full)
    summed = nn.value_and_grad(full, lambda: sum(loss(batch_arrays(b))[0] for b in batches))
    gradients = dict(tree_flatten(summed()[1]))
    inputs = mx.array([[5, 9, 2, 7]])
    before = model(inputs)
    adapt(model, study.NALoRAConfig(rank=3, num_layers=-1))
    initial = {path: m.lora_a for path, m in model.named_modules() if "lora_a" in m}
    assert len(initial) == 3 * 7
    study_methods.fit_lora_a(model, examples, study_methods.GATED, 4, 0)
    assert mx.allclose(model(inputs), before, atol=1e-5)
    for path, module in model.named_modules():
        if "lora_a" not in module:
            continue
        a = np.array(module.lora_a)
        if path.rsplit(".", 1)[-1] not in study_methods.GATED:
            assert mx.array_equal(module.lora_a, initial[path])
            continue
        gradient = np.array(gradients[f"{path}.weight"], np.float64).T
        best = (np.linalg.svd(gradient, compute_uv=False)[:3] ** 2).sum()
        reached = (np.linalg.norm(np.linalg.qr(a)[0].T @ gradient) ** 2) / best
        by_chance = (np.linalg.norm(np.linalg.qr(np.array(initial[path]))[0].T @ gradient) ** 2) / best
        assert reached > 0.7 > 0.4 > by_chance
        norms = np.linalg.norm(a, axis=0)
        assert np.allclose(norms, np.sqrt((np.array(initial[path]) ** 2).sum(0).mean()), rtol=1e-4)


# --- learning rates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [1e-4, 4e-3, 5e-2])
def test_the_best_rate_is_inside_its_grid(monkeypatch, best):
    calls = []

    def fake(settings, _):
        calls.append(len(settings))
        return [record("lora", s.seed, abs(np.log(s.rate / best)), rate=s.rate) for s in settings]

    monkeypatch.setattr(study, "run_all", fake)
    (rates,) = study.mean_losses(study.tune(arguments())).values()
    found = min(rates, key=lambda rate: rates[rate])
    assert abs(np.log(found / best)) <= np.log(2) / 2 + 0.01
    assert min(rates) < found < max(rates)


def test_confirm_refuses_the_seeds_of_tune(tmp_path):
    tuned = tmp_path / "tune.jsonl"
    tuned.write_text(json.dumps(record("lora", 1, 2.0)) + "\n")
    with pytest.raises(SystemExit, match=r"seeds \[1\]"):
        study.confirm(arguments(tuned=tuned, seeds=[1, 2]))
    with pytest.raises(SystemExit, match=r"no runs of .*dora"):
        study.confirm(arguments(tuned=tuned, seeds=[2], methods=["dora"]))


def test_multiples_of_the_best_rate_are_run(tmp_path, monkeypatch):
    tuned = tmp_path / "tune.jsonl"
    losses = {1e-3: 2.0, 2e-3: 1.0, 4e-3: 3.0}
    tuned.write_text("".join(json.dumps(record("lora", 1, losses[r], rate=r)) + "\n" for r in losses))
    monkeypatch.setattr(study, "run_all", lambda settings, _: settings)
    settings = study.confirm(arguments(tuned=tuned, seeds=[2], multiples=[1.0, 2.0, 4.0]))
    assert [setting.rate for setting in settings] == [2e-3, 4e-3, 8e-3]
    assert {setting.final for setting in settings} == {True}


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    """After an interruption in the middle of a line."""
    submitted = []

    class Executor(ThreadPoolExecutor):
        def __init__(self, workers, mp_context):
            super().__init__(workers)

        def submit(self, function, setting, data):
            submitted.append(setting)
            return super().submit(record, setting.method, setting.seed, 3.0)

    output = tmp_path / "runs.jsonl"
    done = study.Setting("m", "t", "lora", 1e-3, 0, 10, 4, False)
    missing = study.Setting(**vars(done) | {"seed": 1})
    output.write_text(json.dumps(record("lora", 0, 2.0)) + '\n{"key": "half a li')
    monkeypatch.setattr(study, "ProcessPoolExecutor", Executor)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # run_all sets it
    for _ in range(2):
        results = study.run_all([missing, done], arguments(output=output, jobs=1, data=""))
        assert [result["valid"]["loss"] for result in results] == [3.0, 2.0]
    assert submitted == [missing]
    assert study.read_results(output).keys() == {done.key, missing.key}


# --- rates that are too high ---------------------------------------------------------------------------------


def rate_record(method, seed, multiple, loss, best=1e-3):
    tested = {"test": {"loss": loss}, "untrained": 4.0}
    return record(method, seed, 2.0, rate=multiple * best, **tested)


def test_regrets_are_relative_to_loras_mean_at_its_best_rate():
    records = [rate_record("lora", seed, m, m * (1 + seed)) for seed in (0, 1) for m in (1, 2)]
    records += [rate_record("soft", seed, m, 1.5, best=2e-3) for seed in (0, 1) for m in (1, 2)]
    regrets = study_tolerance.Regrets(records)
    assert regrets.multiples == [1, 2]
    assert regrets.reference["m", "t"] == 1.5
    found = regrets.of(("m", "t"), "lora", 2)
    assert found == pytest.approx({0: 100 * np.log(2 / 1.5), 1: 100 * np.log(4 / 1.5)})
    differences = regrets.differences(("m", "t"), "soft", 2)
    assert differences == pytest.approx({0: -100 * np.log(2 / 1.5), 1: -100 * np.log(4 / 1.5)})


def test_a_diverged_run_counts_as_the_untrained_model(tmp_path):
    records = [rate_record("lora", seed, 1, 1.0) for seed in range(3)]
    records += [rate_record("soft", seed, 1, loss) for seed, loss in enumerate((1.0, 5.0, float("inf")))]
    del records[-1]["untrained"]  # a run that ended early has measured nothing
    regrets = study_tolerance.Regrets(records)
    assert regrets.count_diverged(("m", "t"), "soft", 1) == 2
    assert list(regrets.of(("m", "t"), "soft", 1).values()) == pytest.approx([0, *2 * [100 * np.log(4.0)]])
    assert "(2/3)" in study_tolerance.regret_table(regrets)
    assert "2 diverged" in study_tolerance.difference_table(regrets, 1)
    study_tolerance.plot(regrets, tmp_path / "tolerance.svg")
    assert "<!-- soft -->" in (tmp_path / "tolerance.svg").read_text()


def test_seconds_until_a_loss_are_interpolated():
    curve = [(0.0, 0, 4.0), (10.0, 5, 2.0), (20.0, 9, 1.0)]
    assert time_to_quality.seconds_until(curve, 3.0) == 5
    assert time_to_quality.seconds_until(curve, 1.5) == 15
    assert time_to_quality.seconds_until(curve, 4.5) == 0
    assert time_to_quality.seconds_until(curve, 0.5) == np.inf


def test_times_are_shares_of_the_baselines(tmp_path):
    curves = {
        "mlx_lm.lora": [(0.0, 0, 4.0), (10.0, 5, 2.0)],
        "mlx_lm.lora@1": [(0.0, 0, 4.0), (10.0, 5, 9.0)],  # a diverged run is no goal
        "lora@1e-4": [(0.0, 0, 4.0), (10.0, 9, 0.0)],
    }
    records = [
        {"task": "t", "run": run, "seed": seed, "curve": curve}
        for run, curve in curves.items()
        for seed in (0, 1)
    ]
    time_to_quality.plot(records, tmp_path / "time.svg")
    assert "<!-- lora@1e-4 -->" in (tmp_path / "time.svg").read_text()
    last = time_to_quality.tables(records).splitlines()[-1]
    assert last == "| lora@1e-4 | 9 | 0.000 [0.000, 0.000] | 0.50 [0.50, 0.50] |"


def test_clock_leaves_out_evaluations(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time_to_quality.time, "perf_counter", lambda: now[0])

    def evaluate():
        now[0] += 100
        return 1.0

    clock = time_to_quality.Clock(10, 2, evaluate)
    clock.start()
    ended = []
    for iteration in range(1, 11):
        now[0] += 1
        ended.append(clock.tick(iteration))
    assert [point[:2] for point in clock.curve] == [(0, 0), (3, 3), (10, 10)]  # due at 2.5 and 10
    assert ended == [False] * 9 + [True]


@pytest.mark.parametrize(
    "text", ["lora@x", "other", "peft:quick", "lora:quick@1e-4", "lora@1e-4+warmup", "lora@+bias_correction"]
)
def test_bad_runs_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no run"):
        time_to_quality.parse_run(text)


# --- scores -------------------------------------------------------------------------------------------------


def test_exact_answers_equal_greedy_generation():
    model = build_model(gain=2.0)
    rng = np.random.default_rng(0)
    examples, exact = [], []
    for i in range(12):
        prompt = rng.integers(1, VOCABULARY, 6)
        answer = [int(t) for t, _ in itertools.islice(generate_step(mx.array(prompt), model), 4)]
        if i % 3 == 0:
            answer[i % 4] = (answer[i % 4] + 1) % VOCABULARY
        exact.append(i % 3 != 0)
        tokens = np.array([*prompt, *answer], np.int32)
        examples.append(Example(tokens, np.arange(10) >= 6, str(i)))
    scores = study_tasks.score(find_output_head(model), examples, [])
    assert scores["exact"] == np.mean(exact)
    losses = []
    for example in examples:
        logits = np.array(model(mx.array(example.tokens[None, :-1])))[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-logp[i - 1, example.tokens[i]] for i in range(6, 10)]
    assert abs(scores["loss"] - np.mean(losses)) < 1e-5


def test_a_choice_is_the_most_likely_candidate():
    model = build_model(gain=2.0)
    rng = np.random.default_rng(1)
    examples, choices, correct = [], [], []
    for i in range(10):
        tokens = rng.integers(1, VOCABULARY, 8 + i % 3).astype(np.int32)
        logits = np.array(model(mx.array(tokens[None, :-1])))[0, 5]
        candidates = [int(tokens[6]), *(int(c) for c in rng.choice(VOCABULARY, 3, replace=False))]
        examples.append(Example(tokens, np.arange(len(tokens)) >= 5, str(i)))
        choices.append((6, candidates))
        correct.append(logits[candidates[0]] >= max(logits[c] for c in candidates))
    assert 0 < np.mean(correct) < 1
    assert study_tasks.score(find_output_head(model), examples, choices)["accuracy"] == np.mean(correct)


def test_choices_differ_in_one_token():
    assert study_tasks.differing_tokens([[1, 2, 3], [1, 9, 3]], 10) == (11, [2, 9])
    with pytest.raises(ValueError):
        study_tasks.differing_tokens([[1, 2, 3], [4, 9, 3]], 10)


def test_orders_are_distinct_and_reproducible():
    orders = study_tasks.orders()
    prompts = [row["prompt"] for split in orders.values() for row in split]
    assert len(set(prompts)) == len(prompts) == 1650
    assert all(json.loads(row["completion"])["size"] in study_tasks.SIZES for row in orders["test"])
    assert orders == study_tasks.orders()


# --- tables -------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_seed_and_relative_to_the_baseline():
    noise = np.random.default_rng(0).normal(0, 1, 20)
    records = [record("lora", s, 10 + noise[s]) for s in range(20)]
    records += [record("soft", s, 10 + noise[s] - 0.1) for s in range(20)]
    pairs = study_tables.PairedRuns(records, "valid")
    differences = list(pairs.differences("m", "t", "soft", "loss").values())
    assert len(differences) == 20
    assert np.allclose(differences, -100 * 0.1 / (10 + noise.mean()))
    row = study_tables.table(pairs, "loss", "Loss").splitlines()[-1]
    assert row.startswith("| soft | -")
    assert "20/20" in row
    assert "*" in row


def test_bootstrap_intervals_cover_the_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = study_tables.bootstrap_interval(list(rng.normal(0.3, 1, 20)), 0.95)
        covered += low <= 0.3 <= high
    assert 170 <= covered <= 198


def test_the_best_rate_of_each_method_is_compared():
    records = [record("lora", 0, loss, rate=rate) for rate, loss in ((1e-3, 2.0), (2e-3, 1.0), (4e-3, 3.0))]
    assert [r["valid"]["loss"] for r in study_tables.at_best_rates(records)] == [1.0]


def test_forgetting_is_compared_at_equal_loss():
    curve = [{"loss": 4.0, "kl": 0.0}, {"loss": 2.0, "kl": 1.0}, {"loss": 1.0, "kl": 3.0}]
    assert study_tables.kl_at(curve, 3.0) == pytest.approx(0.5)
    assert study_tables.kl_at(curve, 1.5) == pytest.approx(2.0)
    assert study_tables.kl_at(curve, 0.5) == 3.0


def test_the_plots_are_drawn(tmp_path):
    curve = [
        {"step": step, "loss": 3.0 - step / 10, "kl": 0.1, "misalignment": [0.2, 0.4]} for step in range(3)
    ]
    spread = {"mean": 0.5, "p10": 0.1, "p50": 0.4, "p90": 1.5}
    records = [record("lora", 0, 2.0, curve=[{**p, "misalignment": None} for p in curve], importance={})]
    records += [record("soft", s, 2.0, curve=curve, importance={"a": spread, "b": spread}) for s in range(2)]
    study_tables.plot(records, tmp_path)
    figure = (tmp_path / "study.svg").read_text()
    for label in ("selection misalignment", "importance / its mean", "soft"):
        assert f"<!-- {label} -->" in figure
