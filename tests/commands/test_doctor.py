"""nalora doctor: its checks of machines, models and data, their levels, and its exit status."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from rich.console import Console

from nalora_mlx.__main__ import main
from nalora_mlx.core import machine, optional_dependencies
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.notices import Note
from nalora_mlx.data.rows.formats import Row
from nalora_mlx.doctor import data, memory
from nalora_mlx.doctor.machine import check_machine
from nalora_mlx.doctor.page import LABEL_WIDTH, Page
from tests.adapters.test_miniatures import ZOO, build

SMALL = ["--batch-size", "2", "--max-seq-length", "32"]
TITLES = ["Machine", "Kernels", "Model", "Data", "Memory", "Disk", "Extras"]


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch):
    """No warnings about the machine, whichever it is."""
    monkeypatch.setattr(machine, "matmul_gflops", lambda: 100.0)
    monkeypatch.setattr(machine, "has_cpp_compiler", lambda: True)


def page_of(capsys, *flags, status=0):
    """Return {title: lines} of the page and what was printed to stderr. Every line has a mark, except for rows."""
    assert main(["doctor", *map(str, flags)]) == status
    done = capsys.readouterr()
    body, verdict = done.out.rstrip("\n").split("\n\n")
    sections = {}
    for line in body.splitlines():
        title, text = line[:LABEL_WIDTH].strip(), line[LABEL_WIDTH:]
        if title:
            sections[title] = []
        sections[list(sections)[-1]].append(text)
    sections["verdict"] = [line.strip() for line in verdict.splitlines()]
    rows = sections.pop("Masks", [])
    assert list(sections) == [*TITLES, "verdict"]
    for lines in sections.values():
        assert all(re.match(r"[✓·!✗] \S|  +rows ", line) for line in lines), lines
    return sections | ({"Masks": rows} if rows else {}), done.err


def test_the_page_without_model_and_data(capsys):
    sections, err = page_of(capsys)
    assert sections["Machine"][-1] == "✓ float32 matrix products: 100 GFLOP/s"
    assert sections["Model"] == ["· none given; --model M shows what NA-LoRA would adapt"]
    (line,) = sections["Memory"]
    assert re.fullmatch(r"· [\d.]+ GB, of which a run may use [\d.]+ GB", line)
    assert re.match(r"✓ [\d.]+ GB free for adapters", sections["Disk"][0])
    assert sections["verdict"] == ["✓ no problem, no warning"]
    assert err == ""


def test_prompts_that_are_trained_on_are_mentioned(model_directory, data_directory, tmp_path, capsys):
    note = "· prompts are trained on too; --mask-prompt trains on the answers only"
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "the cat is red"}\n' * 4)
    for place, flags, shown in (
        (data_directory, [], True),
        (data_directory, ["--mask-prompt"], False),
        (texts, [], False),
    ):
        sections, _ = page_of(capsys, "--model", model_directory, "--data", place, *flags, *SMALL)
        assert (note in sections["Data"]) == shown


def test_the_page_of_a_run(model_directory, data_directory, capsys):
    flags = ["--model", model_directory, "--data", data_directory, "--mask-prompt"]
    sections, err = page_of(capsys, *flags, *SMALL)
    assert sections["Model"] == [
        f"✓ {model_directory}: 3 layers, 0.00 GB of weights",
        "✓ NA-LoRA: model.layers.0-2.mlp, silu (gate_proj, up_proj, down_proj)",
        "· LoRA: 12 other modules, self_attn.k_proj, .o_proj, .q_proj, .v_proj",
    ]
    assert any(re.match(r"✓ train +9 +\d+ +\d+% +\d+ +\d+ +\d+ +\d+$", line) for line in sections["Data"])
    bound = r"✓ upper bound [\d.]+ GB for 2 x \d+ tokens: fits; --memory measures it"
    assert re.fullmatch(bound, sections["Memory"][-1])
    assert "10 checkpoints of " in sections["Disk"][0]
    # The rows of valid and test are in train too.
    assert sections["verdict"] == [
        "! 2 warnings, no problem: nalora lora --train with the same flags starts the run"
    ]
    assert err == ""


def test_a_single_row_is_a_row(model_directory, tmp_path, capsys):
    row = json.dumps({"question": "the cat is", "answer": "red"})
    (tmp_path / "train.jsonl").write_text(row + "\n")
    flags = ["--model", model_directory, "--data", tmp_path, "--batch-size", 1, "--max-seq-length", 32]
    sections, _ = page_of(capsys, *flags, "--num-layers", 1)
    page = " ".join(line for lines in sections.values() for line in lines)
    assert "train: 1 row read as " in page
    assert not re.search(r"\b1 \w*(rows|layers|checkpoints|warnings|problems)\b", page), page
    sections, _ = page_of(capsys, "--data", tmp_path)
    assert "· 1 row for train; --model M shows their tokens and what is trained on" in sections["Data"]


def test_what_was_understood_is_no_warning(model_directory, tmp_path, capsys):
    """The form of rows, and rows held out, need no action."""
    rows = [json.dumps({"question": "the cat is", "answer": color}) for color in ("red", "green", "blue")]
    (tmp_path / "train.jsonl").write_text("\n".join([*rows, json.dumps({"question": "a", "answer": ""})]))
    flags = ["--model", model_directory, "--data", tmp_path, "--max-seq-length", 32]
    sections, _ = page_of(capsys, *flags)
    (form,) = [line for line in sections["Data"] if "4 rows read as" in line]
    (held_out,) = [line for line in sections["Data"] if "held out" in line]
    (empty,) = [line for line in sections["Data"] if "empty answer" in line]
    assert [line[0] for line in (form, held_out, empty)] == ["·", "·", "!"]


def write_pairs(directory, *others):
    """Write preference rows, and other rows after them."""
    colours = (("cat", "red", "blue"), ("dog", "green", "red is red"), ("bird", "blue", "red"))
    rows = [{"prompt": f"what is the {a} ?", "chosen": good, "rejected": bad} for a, good, bad in colours]
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *others]))
    return path


PREFERENCES = "· preference rows: --train-mode dpo (or orpo, simpo, kto) trains on them; checked as for dpo"


def test_preference_rows_are_recognized(model_directory, tmp_path, capsys):
    path = write_pairs(tmp_path)
    flags = ["--model", model_directory, "--data", path, "--valid-fraction", 0, *SMALL]
    sections, _ = page_of(capsys, *flags)
    assert sections["Data"][0] == PREFERENCES
    assert any(re.match(r"✓ train +3 +6 +\d+ +\d+% ", line) for line in sections["Data"])
    assert not any("--mask-prompt" in line for line in sections["Data"])
    assert sections["verdict"] == [
        "✓ ready: nalora lora --train --train-mode dpo with the same flags starts the run"
    ]
    titles = [line.strip() for line in sections["Masks"] if line.strip().startswith(str(path))]
    assert titles == [f"{path}:{n} ({what})" for n in (1, 2) for what in ("chosen", "rejected")]
    shown = "\n".join(sections["Masks"])
    assert re.findall(r"⟦(.*?)<", shown) == ["red ", "blue ", "green ", "red is red "]
    for mode in ("dpo", "orpo", "simpo", "kto"):
        sections, _ = page_of(capsys, *flags, "--train-mode", mode)
        assert PREFERENCES not in sections["Data"]
        assert sections["verdict"] == ["✓ ready: nalora lora --train with the same flags starts the run"]
        assert "fits" in sections["Memory"][-1]
        assert any("--mask-prompt" in line for line in sections["Data"]) == (mode == "orpo")


def test_problems_of_preference_rows(model_directory, tmp_path, capsys):
    bad = {"prompt": "what ?", "chosen": "red", "rejected": "red"}
    path = write_pairs(tmp_path, bad)
    sections, _ = page_of(capsys, "--data", path, "--valid-fraction", 0, status=2)
    assert sections["Data"][:2] == [
        f"✗ {path}:4: 'chosen' and 'rejected' are the same; remove the row, or correct one of them",
        PREFERENCES,
    ]
    assert sections["Data"][-1] == "· 3 rows for train; --model M shows their tokens and what is trained on"
    # Whoever asks for supervised training, or has more rows for it, is told what it does not take.
    answers = [{"prompt": "what ?", "completion": "red"}] * 4
    for flags, others in ((["--train-mode", "sft"], []), ([], answers)):
        sections, _ = page_of(capsys, "--data", write_pairs(tmp_path, *others), *flags, status=2)
        assert sections["Data"][0].startswith(f"✗ {path}:1, :2, :3: holds a chosen and a rejected answer")
        assert PREFERENCES not in sections["Data"]


def test_rows_with_labels_are_recognized(model_directory, tmp_path, capsys):
    path = tmp_path / "labels.csv"
    path.write_text("prompt,completion,label\nthe cat,red,True\nthe dog,blue,False\n")
    sections, _ = page_of(capsys, "--data", path, "--valid-fraction", 0)
    assert sections["Data"][0] == (
        f"! train: nothing reads the keys 'label' (2 rows, {path}:2); --train-mode kto learns from 'label' if it is "
        "true or false"
    )
    flags = ["--model", model_directory, "--data", path, "--valid-fraction", 0, "--train-mode", "kto", *SMALL]
    sections, _ = page_of(capsys, *flags)
    titles = [line.strip() for line in sections["Masks"] if line.strip().startswith(str(path))]
    assert titles == [f"{path}:2 (label true)", f"{path}:3 (label false)"]
    path.write_text("text,label\nthe cat,True\n")
    assert "kto" not in page_of(capsys, "--data", path, "--valid-fraction", 0)[0]["Data"][0]


@pytest.mark.parametrize("mode", ["dpo", "orpo", "simpo", "kto"])
def test_memory_of_preference_training_without_data(model_directory, mode, capsys):
    sections, _ = page_of(capsys, "--model", model_directory, *SMALL, "--train-mode", mode)
    rows = 2 if mode == "kto" else 4  # two answers of each row
    assert f"for {rows} x 32 tokens: fits" in sections["Memory"][-1]


def test_masks_are_shown_by_default_in_short(model_directory, tmp_path, capsys):
    question = "the cat is red " * 40
    row = json.dumps({"prompt": question, "completion": "the cat\nis green"})
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 3)
    flags = ["--model", model_directory, "--data", tmp_path, "--mask-prompt"]
    sections, _ = page_of(capsys, *flags)
    shown = "\n".join(sections["Masks"])
    assert sections["Masks"][0] == "· what is trained on is in ⟦ ⟧; --show-masks N shows whole rows"
    assert f"{tmp_path}/train.jsonl:2" in shown
    assert f"{tmp_path}/train.jsonl:3" not in shown
    assert len(re.findall(r"cat … .*⟦the cat", shown)) == 2
    assert "is green" in shown[shown.rindex("⟦") : shown.rindex("⟧")]
    assert question.strip() not in shown
    assert question.strip() in "\n".join(page_of(capsys, *flags, "--show-masks", 1)[0]["Masks"])
    assert "Masks" not in page_of(capsys, *flags, "--show-masks", 0)[0]


def test_the_memory_plan_is_that_of_lora_plan(model_directory, data_directory, tmp_path, capsys):
    flags = ["--model", model_directory, "--data", data_directory, *SMALL, "--grad-checkpoint"]
    sections, _ = page_of(capsys, *flags, "--memory-budget", "10KB", "--memory")
    place = ["--adapter-path", str(tmp_path / "a")]
    assert main(["lora", "--plan", *map(str, flags), *place, "--memory-budget", "10KB"]) == 0
    want = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: "))
    ours = sections["Memory"][2].removeprefix("! ").partition("; what would fit")[0]
    want = want.removeprefix("memory: ")

    def shape(line):
        return re.sub(r"about [\d.]+ GB", "", line)

    assert shape(ours) == shape(want)
    assert not any("with --grad-checkpoint" in line for line in sections["Memory"])


def test_memory_is_measured_only_when_asked(model_directory, capsys, monkeypatch):
    """Without data, rows are assumed to be full. An upper bound above the budget asks for a measurement."""
    flags = ["--model", model_directory, *SMALL, "--memory-budget", "1000"]
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_measure", lambda *_: pytest.fail("measured"))
        sections, _ = page_of(capsys, *flags)
    assumed = "· without --data, all rows are assumed to have 32 tokens (--max-seq-length)"
    assert sections["Memory"][1] == assumed
    text = r"! upper bound [\d.]+ GB for 2 x 32 tokens: may not fit; --memory measures what the run needs"
    assert re.fullmatch(text, sections["Memory"][2])
    assert sections["verdict"] == ["! 1 warning, no problem"]
    sections, _ = page_of(capsys, *flags, "--memory")
    measured = r"! about .* 2 rows of 32 tokens; .*does not fit; what would fit: "
    assert re.match(measured, sections["Memory"][3])
    assert main(["doctor", "--memory"]) == 2
    assert "--memory measures training steps of a model; give --model too" in capsys.readouterr().err


def test_large_models_are_not_read_for_a_quick_look(model_directory, capsys, monkeypatch):
    monkeypatch.setattr(memory, "QUICK_WEIGHTS", 1000)
    monkeypatch.setattr(memory, "_estimate", lambda *_: pytest.fail("estimated"))
    sections, _ = page_of(capsys, "--model", model_directory, *SMALL)
    assert sections["Memory"][1].startswith("· not estimated, which would read all weights; --memory ")


@pytest.mark.parametrize("full", [False, True])
def test_memory_is_not_measured_if_no_row_can_be_trained_on(model_directory, tmp_path, capsys, full):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "x"}\n')
    config = tmp_path / "config.yaml"
    config.write_text("fine_tune_type: full\n" if full else "train: true\n")
    flags = ["--model", str(model_directory), "--data", str(path), "--config", str(config)]
    assert main(["doctor", *flags]) == 2
    out = capsys.readouterr().out
    assert "not measured: no row can be trained on" in out
    assert "rows are assumed" not in out
    assert ("full fine-tuning of 3 layers" in out) == full
    assert ("NA-LoRA: " in out) != full


def test_settings_come_from_a_config_file(model_directory, data_directory, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {model_directory}\ndata: {data_directory}\nbatch_size: 3\nnum_layers: 2\n"
        "lora_parameters: {rank: 4, keys: [mlp.gate_proj, self_attn.q_proj]}\n"
    )
    sections, _ = page_of(capsys, "--config", config)
    assert sections["Model"] == [
        f"✓ {model_directory}: 3 layers, the last 2 adapted, 0.00 GB of weights",
        "✓ NA-LoRA: model.layers.1-2.mlp, silu (gate_proj, up_proj, down_proj)",
        "· LoRA: 2 other modules, self_attn.q_proj",
    ]
    assert "3 x 24 tokens" in sections["Memory"][1]


def test_keys_left_out_by_default_are_listed_with_the_reason(
    tokenizer_directory, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(memory, "_estimate", lambda *_: None)  # traces recurrences, which takes long
    directory = tmp_path / "hybrid"
    shutil.copytree(tokenizer_directory, directory)
    model = build("qwen3_next")
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(ZOO["qwen3_next"].config))
    sections, _ = page_of(capsys, "--model", directory)
    assert sections["Model"][-1] == (
        "· left out by default: linear_attn.in_proj_ba (gates of the recurrence); "
        "mlp.gate, mlp.shared_expert_gate (routers)"
    )
    sections, _ = page_of(capsys, "--model", directory, "--keys", "mlp.gate_proj", "linear_attn.in_proj_ba")
    assert not any("left out" in line for line in sections["Model"])


def test_only_the_first_gated_mlp_of_each_kind_is_compared(model_directory, monkeypatch):
    """A preview. The result, and how the others round, are those of comparing all of them."""
    from nalora_mlx.adapters import attach, layouts
    from nalora_mlx.core.config import NALoRAConfig
    from nalora_mlx.models.loading import load_module

    verify, compared = layouts.verify, []
    monkeypatch.setattr(
        layouts, "verify", lambda match, *rest: compared.append(match.path) or verify(match, *rest)
    )

    def adapted(**how):
        model, _ = load_module(str(model_directory))
        model.set_dtype(mx.bfloat16)
        wide = model.layers[2].mlp
        for name in ("gate_proj", "up_proj"):
            wide[name].weight = mx.concatenate([wide[name].weight] * 2)
        wide.down_proj.weight = mx.concatenate([wide.down_proj.weight] * 2, axis=1)
        compared.clear()
        result = attach.adapt(model, NALoRAConfig(num_layers=-1), **how)
        paths = list(dict.fromkeys(compared))
        return paths, (result.gated, result.skipped), [mlp.precise for mlp in attach.gated_mlps(model)]

    every, result, precise = adapted()
    assert every == [f"model.layers.{i}.mlp" for i in range(3)]
    assert adapted(verify_all=False) == (["model.layers.0.mlp", "model.layers.2.mlp"], result, precise)


def test_an_adapter_without_gates_is_a_warning(model_directory, capsys):
    sections, _ = page_of(capsys, "--model", model_directory, *SMALL, "--keys", "self_attn.q_proj")
    assert any(line.startswith("! ") and "acts nowhere" in line for line in sections["Model"])


def test_all_problems_are_on_one_page(tmp_path, capsys):
    """A missing model and bad rows are both reported, and the rest of the page is complete."""
    (tmp_path / "train.jsonl").write_text('{"prompt": \n' + json.dumps({"text": "a"}) + "\n")
    sections, err = page_of(capsys, "--model", "./nowhere", "--data", tmp_path, status=2)
    assert sections["Model"][0].startswith("✗ --model ./nowhere: no such directory")
    assert any(re.match(r"✗ .*train.jsonl:1: not valid JSON", line) for line in sections["Data"])
    assert sections["verdict"] == ["✗ 2 problems that keep a run from starting"]
    assert err == "nalora doctor: error: 2 problems that keep a run from starting; see above\n"
    sections, err = page_of(capsys, "--data", tmp_path / "none", status=2)
    assert "1 problem that keeps a run from starting" in err


def test_a_full_disk_prevents_a_run(model_directory, capsys, monkeypatch):
    from nalora_mlx.core import storage

    monkeypatch.setattr(storage, "free_space", lambda _: 10**9)
    sections, _ = page_of(capsys)
    assert sections["Disk"][0].startswith("! 1.0 GB free for adapters")
    monkeypatch.setattr(storage, "free_space", lambda _: 1000)
    sections, _ = page_of(capsys, "--model", model_directory, *SMALL, status=2)
    assert re.match(r"✗ adapters: .* free, but a checkpoint", sections["Disk"][0])


def test_a_slow_machine_gets_remedies(capsys, monkeypatch):
    monkeypatch.setattr(machine, "matmul_gflops", lambda: 3.0)
    monkeypatch.setattr(machine, "has_cpp_compiler", lambda: False)
    sections, _ = page_of(capsys)
    assert [line[:2] for line in sections["Machine"][3:]] == ["! ", "! "]
    assert "or preload a BLAS: LD_PRELOAD" in sections["Machine"][3]
    assert sections["Machine"][4].endswith("; install g++")


# --- models that are slow on a CPU ----------------------------------------------------------------------------


@pytest.fixture(params=["quantized", "half"])
def slow_model(request, model_directory, tmp_path):
    """Return a model that is quantized or in half precision, and which of the two."""
    from nalora_mlx.models.loading import load_module

    directory = tmp_path / "slow"
    shutil.copytree(model_directory, directory)
    if request.param == "quantized":
        model, config = load_module(str(model_directory), quantize=4)
        (directory / "config.json").write_text(json.dumps(config))
    else:
        model, config = load_module(str(model_directory))
        model.set_dtype(mx.bfloat16)
    for path in directory.glob("model*"):
        path.unlink()
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return directory, request.param


def test_a_model_that_is_slow_here_is_announced_first(slow_model, capsys, monkeypatch):
    from nalora_mlx.models import loading

    directory, kind = slow_model
    monkeypatch.setattr(memory, "_measure", lambda *_: pytest.fail("measured"))
    flags = ["--model", directory, *SMALL, *(["--memory"] if kind == "quantized" else [])]
    sections, _ = page_of(capsys, *flags)
    announced, loaded = sections["Model"][:2]
    convert = f"mlx_lm.convert --hf-path {directory} --mlx-path slow-float32 --dtype float32"
    how = {"quantized": "is quantized, ", "half": "is in half precision, "}[kind]
    assert announced.startswith(f"! {directory} {how}which on a CPU takes ")
    assert announced.endswith(convert + " --dequantize" * (kind == "quantized"))
    assert loaded.startswith(f"✓ {directory}: 3 layers")
    skipped = "· not measured: on this CPU, a training step with quantized weights takes minutes"
    assert (sections["Memory"][1] == skipped) == (kind == "quantized")
    # The weights are not read to find out.
    monkeypatch.setattr(mx, "load", lambda *_: pytest.fail("loaded"))
    assert loading.slow_on_cpu_notice(str(directory)) == announced.removeprefix("! ")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert loading.slow_on_cpu_notice(str(directory)) is None


def test_float32_is_not_slow_unless_it_is_quantized_on_loading(model_directory):
    from nalora_mlx.models.loading import slow_on_cpu_notice

    assert slow_on_cpu_notice(str(model_directory)) is None
    assert slow_on_cpu_notice(str(model_directory), quantize=4).startswith("--quantize 4 makes the model ")


# --- the end by a signal --------------------------------------------------------------------------------------

# A page that stays in one MLX evaluation of some seconds, in which Python runs no signal handlers.
LONG_EVALUATION = """
import sys
import mlx.core as mx
from nalora_mlx.doctor import machine
from nalora_mlx.__main__ import main

def check(page):
    page.note("evaluating")
    a = mx.ones((2048, 64))
    for _ in range(20000):
        a = mx.sort(a, axis=0)
    mx.eval(a)
    raise AssertionError("the evaluation was to last")

machine.check_machine = check
sys.exit(main(["doctor"]))
"""


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGTERM, 143, "nalora doctor: terminated: stopped by SIGTERM\n"),
        (signal.SIGINT, 130, "nalora doctor: interrupted: stopped by Ctrl-C\n"),
    ],
)
def test_a_signal_ends_it_at_once(number, status, message):
    code = [sys.executable, "-c", LONG_EVALUATION]
    with subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "Machine  · evaluating\n"
        time.sleep(0.5)
        began = time.perf_counter()
        os.kill(process.pid, number)
        try:
            _, err = process.communicate(timeout=10)
        finally:
            process.kill()
    assert time.perf_counter() - began < 5
    assert (process.returncode, err) == (status, message)


# --- many rows ------------------------------------------------------------------------------------------------


def test_a_sample_has_the_longest_rows_and_the_first():
    rows = [Row(f"a:{i}", [], text="x" * (50 + i % 7)) for i in range(1000)]
    rows[333] = replace(rows[333], text="x" * 2000)
    assert data.sample(rows, 10**6) == rows
    chosen = data.sample(rows, 40_000)
    assert rows[0] in chosen
    assert rows[333] in chosen
    assert chosen == sorted(chosen, key=rows.index)
    characters = sum(data.TEMPLATE_CHARACTERS + len(row.text) for row in chosen)
    assert 30_000 < characters < 50_000
    huge = [Row("a:1", [], text="x" * 10**6), *rows[:3]]  # a row that is too long to be tokenized quickly
    assert data.sample(huge, 40_000) == rows[:3]
    assert data.sample(huge[:1], 40_000) == huge[:1]


def test_large_data_is_tokenized_in_part_unless_memory_is_measured(
    model_directory, tmp_path, capsys, monkeypatch
):
    rows = [json.dumps({"text": "the cat is red " * (1 + i % 3)}) for i in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "valid.jsonl").write_text(json.dumps({"text": "a dog"}))
    monkeypatch.setattr(data, "QUICK_CHARACTERS", 5000)
    monkeypatch.setattr(memory, "_measure", lambda *_: None)
    flags = ["--model", model_directory, "--data", tmp_path]
    sections, _ = page_of(capsys, *flags)
    said = re.match(
        r"· train: (\d+) of 60 rows tokenized, with the longest ones; --memory ", sections["Data"][0]
    )
    (line,) = [line for line in sections["Data"] if line.startswith("✓ train")]
    assert line.split()[2] == said[1]
    assert 10 < int(said[1]) < 40
    sections, _ = page_of(capsys, *flags, "--memory")
    (line,) = [line for line in sections["Data"] if line.startswith("✓ train")]
    assert line.split()[2] == "60"


# --- kernels and GPUs -----------------------------------------------------------------------------------------


@pytest.fixture
def with_kernels(monkeypatch):
    """Doctor's checks of kernels as on a GPU where those of relu are wrong."""
    from nalora_mlx.ops.kernels import backend, healthcheck

    def find_error(key):
        return "a result is off by 1.0e-01" if key.variant.activation.name == "relu" else None

    monkeypatch.setattr(backend, "backend", lambda: "metal")
    monkeypatch.setattr(healthcheck, "find_error", find_error)


def test_a_wrong_kernel_is_a_failure(with_kernels, tmp_path, capsys):
    """The exit status is 1, also if something else keeps the run from starting."""
    sections, err = page_of(capsys, status=1)
    assert re.fullmatch(r"· compiling \d+ kernels, which takes longer the first time", sections["Kernels"][0])
    assert sections["Kernels"][1] == "· gated residual: 63 of 72 metal kernels agree with MLX"
    assert len(sections["Kernels"]) == 11
    for line in sections["Kernels"][2:]:
        assert re.match(r"✗ the metal kernel of relu, .* is not used, since a result is off", line)
    assert sections["verdict"] == ["✗ 9 failed checks"]
    assert err == "nalora doctor: failed: 9 failed checks; see above\n"
    sections, _ = page_of(capsys, "--data", tmp_path / "none", status=1)
    assert sections["verdict"] == ["✗ 9 failed checks and 1 problem that keeps a run from starting"]


def test_with_a_model_one_kernel_per_activation_is_checked(with_kernels, capsys):
    sections, err = page_of(capsys, "--model", "./nowhere", status=1)
    agree = "· gated residual: 5 of 6 metal kernels agree with MLX; nalora doctor without --model checks all of them"
    assert sections["Kernels"][1] == agree
    assert err.startswith(
        "nalora doctor: failed: 1 failed check and 1 problem that keeps a run from starting"
    )


def test_a_device_is_described(monkeypatch):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 10)
    gb = 10**9
    metal = {"device_name": "Apple M2 Pro", "memory_size": 16 * gb}
    metal["max_recommended_working_set_size"] = 12 * gb
    text = "Apple M2 Pro, 16.0 GB of memory, 12.0 GB of them recommended for the GPU, 10 processors"
    assert machine.describe_device(metal) == text
    cuda = {"device_name": "NVIDIA H100", "total_memory": 80 * gb, "free_memory": gb}
    assert machine.describe_device(cuda) == "NVIDIA H100, 80.0 GB of memory, 10 processors"
    assert machine.describe_device({}) == "unknown, 10 processors"


def test_a_gpu_that_rounds_products_and_compiles_kernels(monkeypatch, capsys):
    from nalora_mlx.ops.kernels.healthcheck import compile_notices

    assert compile_notices() == []
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M5"})
    monkeypatch.setattr(machine, "rounds_float32_products", lambda: True)
    check_machine(Page(Console(highlight=False)))
    *_, device, precision = capsys.readouterr().out.splitlines()
    assert device.strip().startswith("· GPU: Apple M5, ")
    assert "11 bits" in precision
    assert "MLX_ENABLE_TF32=0" in precision
    assert "compiling kernels for this GPU" in compile_notices()[0]


def test_the_chip_is_named(capsys):
    sections, _ = page_of(capsys)
    assert sections["Machine"][2].startswith(f"· CPU: {mx.device_info()['device_name']}")


def test_rounded_products_are_noticed(monkeypatch):
    assert not machine.rounds_float32_products()
    full = mx.full
    monkeypatch.setattr(mx, "full", lambda shape, value: full(shape, value).astype(mx.bfloat16))
    assert machine.rounds_float32_products()


# --- extras ---------------------------------------------------------------------------------------------------


def test_missing_extras_come_with_their_install_command(capsys, monkeypatch):
    monkeypatch.setattr(
        optional_dependencies, "is_installed", lambda package: package in ("gguf", "xllamacpp")
    )
    monkeypatch.setattr(optional_dependencies, "install_command", lambda *extras: f"install {extras}")
    sections, _ = page_of(capsys)
    assert sections["Extras"][0] == "✓ installed: export"
    missing = tuple(extra for extra in optional_dependencies.EXTRAS if extra != "export")
    assert sections["Extras"][1].endswith(f"; install {missing}")


def test_extras_are_those_of_pyproject():
    declared = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    others = {"cpu", "cuda", "all", "kquants", "peft", "trl", "interop", "browser", "digits", "dev"}
    assert set(optional_dependencies.EXTRAS) == set(declared) - others
    for extra in optional_dependencies.EXTRAS:
        names = {re.split(r"[^\w.-]", line)[0].lower() for line in declared[extra]}
        assert {name.lower() for name in optional_dependencies.packages(extra)} == names
    assert optional_dependencies.is_installed("mlx")
    assert not optional_dependencies.is_installed("no-such-package")


def test_an_extra_unknown_to_the_installed_version_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(
        optional_dependencies, "packages", lambda extra: [] if extra == "notebook" else ["mlx"]
    )
    sections, _ = page_of(capsys)
    assert "notebook" not in sections["Extras"][0]
    assert sections["Extras"][1].endswith(f"; {optional_dependencies.install_command('notebook')}")


def test_doctor_runs_from_a_source_tree(capsys, monkeypatch):
    def missing(name):
        raise optional_dependencies.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(optional_dependencies.importlib.metadata, "requires", missing)
    sections, _ = page_of(capsys)
    assert "not installed: data (Parquet" in sections["Extras"][0]


# --- the page itself ------------------------------------------------------------------------------------------


def test_bad_settings_are_an_error_before_the_page(capsys):
    assert main(["doctor", "--batch-size", "0"]) == 2
    done = capsys.readouterr()
    assert done.out == ""
    assert "batch_size is 0" in done.err


def test_the_help_claims_no_default_data(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    out = capsys.readouterr().out
    assert RunConfig.data not in out
    assert "--memory " in out


def test_on_a_terminal_lines_are_indented_and_remedies_have_their_own(capsys):
    console = Console(force_terminal=True, width=40, color_system=None)
    page = Page(console)
    with page.section("Data"):
        page.ok("short")
        page.notice(Note("a note; no remedy"))
        page.notice("word " * 8 + "one; this; remedy " + "word " * 6)
        raise InputError("a problem; do this")
    with pytest.raises(InputError, match="1 problem that keeps a run from starting; see above"):
        page.verdict()
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines] == [
        "Data     ✓ short",
        "         · a note; no remedy",
        "         ! word word word word word word",
        "           word word one; this",
        "           → remedy word word word word",
        "           word word",
        "         ✗ a problem",
        "           → do this",
        "",
        "         ✗ 1 problem that keeps a run",
        "           from starting, and 1 warning",
    ]
