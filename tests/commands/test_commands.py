"""The commands end to end on a tiny model: files, compatibility with mlx-lm, and errors."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load

from nalora_mlx.__main__ import main

FAST = ["--batch-size", "3", "--iters", "12", "--steps-per-eval", "6", "--steps-per-report", "4"]


def train(model_directory, data_directory, output, *flags):
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", output]
    return main(
        ["lora", "--train", *map(str, where), "--learning-rate", "4e-3", "--scale", "4", *FAST, *flags]
    )


@pytest.fixture(scope="module")
def adapter(model_directory, data_directory, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "adapters"
    assert train(model_directory, data_directory, output, "--mask-prompt", "--test", "--iters", "40") == 0
    return output


@pytest.fixture(scope="module")
def fused(model_directory, adapter, tmp_path_factory):
    output = tmp_path_factory.mktemp("fused") / "model"
    status = main(
        ["fuse", "--model", str(model_directory), "--adapter-path", str(adapter), "--save-path", str(output)]
    )
    assert status == 0
    return output


def run(*argv, text=None):
    return subprocess.run([sys.executable, "-m", *map(str, argv)], capture_output=True, text=True, input=text)


# --- output -------------------------------------------------------------------------------------------------


def test_a_run_writes_its_files_and_learns(adapter):
    names = {p.name for p in adapter.iterdir()}
    files = "adapters.safetensors adapter_config.json best checkpoints metrics.jsonl run.json samples.json"
    assert names == set(files.split())
    records = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    valid = [r["loss"] for r in records if r["split"] == "valid"]
    assert valid[-1] < 0.5 * valid[0]
    assert records[-1]["split"] == "test"
    assert records[-1]["loss"] < valid[0]
    layers = next(r for r in records if r["split"] == "train")["layers"]
    assert sorted(layers) == [f"model.layers.{i}.mlp" for i in range(3)]


def test_shared_files_contain_no_local_path(adapter, fused):
    for path in (adapter / "adapter_config.json", fused / "README.md", fused / "config.json"):
        text = path.read_text()
        for place in (str(Path.home()), str(Path.cwd()), "/tmp/", str(adapter.parent)):
            assert place not in text, (path, place)


def answers(model, tokenizer, prompts=("what colour is the cat one ?", "what colour is the bird three ?")):
    from mlx_lm import generate

    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], add_generation_prompt=True, return_dict=False
        )
        for p in prompts
    ]
    return [generate(model, tokenizer, prompt, max_tokens=8) for prompt in rendered]


def test_unmodified_mlx_lm_gives_the_same_answers(model_directory, adapter, fused):
    """Base + adapter in mlx-lm, base + adapter here, and the fused model: the same greedy answers."""
    from nalora_mlx import load_adapter

    theirs, tokenizer = load(str(model_directory), adapter_path=str(adapter))
    base, _ = load(str(model_directory))
    ours, _ = load(str(model_directory))
    load_adapter(ours, adapter)
    ours.eval()
    whole, _ = load(str(fused))
    want = answers(theirs, tokenizer)
    assert want == answers(ours, tokenizer) == answers(whole, tokenizer)
    assert want != answers(base, tokenizer)
    x = mx.array([[1, 5, 11, 14]])
    np.testing.assert_allclose(np.array(whole(x)), np.array(ours(x)), rtol=0, atol=2e-5)


def test_generate_is_mlx_lms_generate(model_directory, adapter):
    flags = [
        "--model",
        model_directory,
        "--adapter-path",
        adapter,
        "--prompt",
        "what colour is the cat two ?",
    ]
    flags += ["--max-tokens", "8", "--verbose", "False"]
    ours, theirs = run("nalora_mlx.generate", *flags), run("mlx_lm", "generate", *flags)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == theirs.stdout
    assert ours.stdout.strip()


def test_generate_has_every_flag_of_mlx_lm():
    from nalora_mlx.generate import LISTS, SWITCHES, VALUES, build_parser

    peer = importlib.import_module("mlx_lm.generate").setup_arg_parser()
    ours = {option for action in build_parser("x")._actions for option in action.option_strings}
    added = {"--chat-template", "--chat-template-args", "--help-all"}
    assert ours == added | {option for action in peer._actions for option in action.option_strings}
    kinds = {option: action for action in peer._actions for option in action.option_strings}
    for names, _, _, kind in VALUES:
        assert kinds[names[0]].nargs is None
        assert kind in (kinds[names[0]].type or str, str)
    assert all(kinds[names[0]].nargs == "+" for names, *_ in LISTS)
    assert all(kinds[names[0]].nargs == 0 for names, _ in SWITCHES)


def test_mlx_lm_fuse_reads_the_adapter(model_directory, adapter, fused, tmp_path):
    done = run(
        "mlx_lm",
        "fuse",
        "--model",
        model_directory,
        "--adapter-path",
        adapter,
        "--save-path",
        tmp_path / "theirs",
    )
    assert done.returncode == 0, done.stderr
    theirs = mx.load(str(tmp_path / "theirs" / "model.safetensors"))
    ours = mx.load(str(fused / "model.safetensors"))
    assert theirs.keys() == ours.keys()
    for name in ours:
        size = np.abs(np.array(theirs[name])).max()
        np.testing.assert_allclose(np.array(ours[name]), np.array(theirs[name]), rtol=0, atol=1e-6 * size)


def test_fuse_has_every_flag_of_mlx_lm():
    from nalora_mlx.chat.__main__ import build_parser as chat_parser
    from nalora_mlx.fuse import build_parser

    ours = {option for action in build_parser("x")._actions for option in action.option_strings}
    source = Path(importlib.import_module("mlx_lm.fuse").__file__).read_text()
    assert set(re.findall(r'"(--[a-z-]+)"', source)) <= ours
    peer = importlib.import_module("mlx_lm.chat").setup_arg_parser()
    ours = {option for action in chat_parser("x")._actions for option in action.option_strings}
    # --pipeline splits a model across machines.
    assert {o for a in peer._actions for o in a.option_strings} - ours == {"--pipeline"}


def test_chat_answers_line_by_line(model_directory, adapter, fused):
    questions = "what colour is the cat one ?\n\n/reset\nwhat colour is the cat one ?\nq\n"
    done = run("nalora_mlx.chat", "--model", fused, "--max-tokens", "8", text=questions)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    model, tokenizer = load(str(model_directory), adapter_path=str(adapter))
    assert first == answers(model, tokenizer, ["what colour is the cat one ?"])[0]


def test_a_cached_conversation_equals_a_fresh_rendering(fused):
    """Reusing the cache changes nothing: the last answer equals one computed from the whole history."""
    from mlx_lm import generate

    from nalora_mlx.models.conversation import Conversation

    model, tokenizer = load(str(fused))
    conversation = Conversation(model, tokenizer, "the dog")
    replies = [
        "".join(conversation.answer(q, max_tokens=6)) for q in ("what is red ?", "the cat one ?", "two ?")
    ]
    history = conversation.messages[:-1]
    prompt = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
    assert generate(model, tokenizer, prompt, max_tokens=6) == replies[-1]
    assert [m["role"] for m in conversation.messages] == ["system"] + ["user", "assistant"] * 3


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_other_fine_tune_types_train_load_and_fuse(kind, model_directory, data_directory, tmp_path, capsys):
    output = tmp_path / "adapters"
    assert train(model_directory, data_directory, output, "--fine-tune-type", kind, "--num-layers", "2") == 0
    assert ("na-lora (the default) gives NA-LoRA" in capsys.readouterr().out) == (kind == "lora")
    assert (
        main(
            [
                "lora",
                "--model",
                str(model_directory),
                "--test",
                "--data",
                str(data_directory),
                "--adapter-path",
                str(output),
            ]
        )
        == 0
    )
    theirs, _ = load(str(model_directory), adapter_path=str(output))
    assert (
        main(
            [
                "fuse",
                "--model",
                str(model_directory),
                "--adapter-path",
                str(output),
                "--save-path",
                str(tmp_path / "fused"),
            ]
        )
        == 0
    )
    whole, _ = load(str(tmp_path / "fused"))
    x = mx.array([[1, 5, 11, 14]])
    np.testing.assert_allclose(np.array(whole(x)), np.array(theirs(x)), rtol=0, atol=5e-5)


def test_resume_from_weights_and_nothing_is_overwritten(
    model_directory, data_directory, adapter, tmp_path, capsys
):
    import shutil

    output = tmp_path / "adapters"
    shutil.copytree(adapter, output)
    before = (output / "adapters.safetensors").read_bytes()
    status = train(
        model_directory,
        data_directory,
        output,
        "--mask-prompt",
        "--resume-adapter-file",
        str(output / "adapters.safetensors"),
        "--iters",
        "3",
    )
    assert status == 0
    assert "moved the previous run" in capsys.readouterr().out
    assert (output / "previous" / "1" / "adapters.safetensors").read_bytes() == before
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    old = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    last = [r["loss"] for r in old if r["split"] == "valid"][-1]
    assert records[0]["loss"] == pytest.approx(last, rel=1e-5)


def test_quantized_base(model_directory, data_directory, tmp_path):
    output = tmp_path / "adapters"
    # Rows of 32 are too short for groups of 64.
    base = tmp_path / "base"
    done = run(
        "mlx_lm", "convert", "--hf-path", model_directory, "--mlx-path", base, "-q", "--q-group-size", "32"
    )
    assert done.returncode == 0, done.stderr
    assert train(base, data_directory, output, "--mask-prompt") == 0
    assert (
        main(
            ["fuse", "--model", str(base), "--adapter-path", str(output), "--save-path", str(tmp_path / "f")]
        )
        == 0
    )
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert config["quantization"]["model.layers.0.mlp.gate_proj"]["bits"] == 8
    fused, tokenizer = load(str(tmp_path / "f"))
    tuned, _ = load(str(base), adapter_path=str(output))
    plain, _ = load(str(base))
    x = mx.array([[1, 5, 11, 14]])
    effect = mx.abs(tuned(x) - plain(x)).max().item()
    assert mx.abs(fused(x) - tuned(x)).max().item() < 0.1 * effect
    assert answers(fused, tokenizer) == answers(tuned, tokenizer)


def test_yaml_config_and_epochs(model_directory, data_directory, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {model_directory}\ndata: {data_directory}\ntrain: true\nadapter_path: {tmp_path / 'a'}\n"
        "optimizer: adamw\nlearning_rate: 1e-2\nbatch_size: 4\nval_batches: -1\nlora_parameters:\n  rank: 4\n"
        "lr_schedule:\n  name: cosine_decay\n  arguments: [1e-2, 20]\nna_parameters: {mask: hard, mask_warmup: 2}\n"
    )
    assert main(["lora", "--config", str(config), "--epochs", "2", "--grad-accumulation-steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "iteration 6:" in out  # 9 rows, 3 batches, 2 epochs
    description = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert description["na_lora"]["mask"] == "hard"
    assert description["lora_parameters"]["rank"] == 4


# --- errors -------------------------------------------------------------------------------------------------


def refused(argv, *expected):
    """Run in a separate process; expect exit status 2 and one line on stderr with the given words."""
    done = run(*argv)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    for words in expected:
        assert re.search(words, lines[0]), lines[0]


def test_bad_input_is_one_line(model_directory, data_directory, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    long = tmp_path / "long"
    long.mkdir()
    (long / "train.jsonl").write_text(json.dumps({"prompt": "the cat " * 50, "completion": "red"}) + "\n")
    config = tmp_path / "c.yaml"
    config.write_text("learning_rat: 1\n")
    lora = ["nalora_mlx.lora", "--train"]
    model, data = ["--model", model_directory], ["--data", data_directory]
    refused([*lora, "--model", "./nowhere", *data], "--model ./nowhere: no such directory")
    refused([*lora, *model, "--data", "./nowhere"], "--data ./nowhere: no such file or directory")
    refused([*lora, *model, "--data", broken], r"train.jsonl:2: not valid JSON")
    refused([*lora, *model, *data, "--config", config], "did you mean 'learning_rate'")
    refused([*lora, *model, *data, "--rank", "0"], "rank is 0; it must be at least 1")
    refused(
        [*lora, *model, "--data", long, "--mask-prompt", "--max-seq-length", "20"],
        "no row has a supervised token within 20 tokens",
        "train.jsonl:1",
        "raise --max-seq-length",
    )
    refused(
        [*lora, *model, *data, "--itres", "3"],
        "unrecognized arguments: --itres 3; did you mean '--iters'?",
        "--help",
    )
    refused([*lora, *model, *data, "--keys", "mlp.gate"], "did you mean 'mlp.gate_proj'")
    refused(
        [*lora, *model, *data, "--keys", "q_proj"], "'q_proj' names no .*; did you mean 'self_attn.q_proj'\\?"
    )
    refused(["nalora_mlx.lora", *model, *data], "nothing to do; give --train")
    refused(
        ["nalora_mlx.lora", "--test", *model, *data, "--adapter-path", tmp_path / "x"], "no adapter in .*x"
    )


def test_bad_input_of_the_other_commands(model_directory, fused, tmp_path):
    model = ["--model", model_directory]
    refused(["nalora_mlx.fuse", *model, "--adapter-path", "nowhere"], "--adapter-path nowhere")
    refused(["nalora_mlx.fuse", *model, "--save-path", fused], "exists; choose another, or give --overwrite")
    refused(["nalora_mlx.fuse", *model, "--bits", "7", "--save-path", tmp_path / "y"], "--bits 7: choose")
    refused(["nalora_mlx.generate", "--model", "./nowhere"], "--model ./nowhere")
    refused(["nalora_mlx.generate", *model, "--adapter-path", "nowhere"], "--adapter-path nowhere")
    refused(["nalora_mlx.chat", "--model", "./nowhere"], "--model ./nowhere")
    refused(["nalora_mlx.export", "gguf", *model, "--output", fused], "--output .* is a directory")


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", "--prompt", "hi"),
        ("chat",),
        ("serve",),
        ("fuse",),
        ("export", "gguf", "--output", "x.gguf"),
    ],
    ids=lambda argv: argv[0],
)
def test_a_missing_model_is_said_and_nothing_is_fetched(
    argv, model_directory, adapter, tmp_path, monkeypatch, capsys
):
    """mlx-lm's commands have models of their own, which they would fetch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetches a model"))
    if argv[0] != "fuse":  # which looks for an adapter first
        assert main([*argv]) == 2
        assert (
            "error: --model is missing; give a directory, or a Hugging Face repo" in capsys.readouterr().err
        )
    assert main([*argv, "--adapter-path", str(adapter / "best")]) == 2
    error = capsys.readouterr().err
    assert (
        f"error: --model is missing; {adapter / 'best'} was trained on {model_directory}: give --model"
        in error
    )


def test_overwrite_replaces_only_models(model_directory, adapter, tmp_path, capsys):
    where = [
        "fuse",
        "--model",
        str(model_directory),
        "--adapter-path",
        str(adapter),
        "--overwrite",
        "--save-path",
    ]
    store = tmp_path / "store"
    (store / "other").mkdir(parents=True)
    (store / "config.json").write_text("{}")
    (store / "other" / "weights").write_text("x")
    assert main([*where, str(store)]) == 2
    assert "holds more than a model" in capsys.readouterr().err
    assert (store / "other" / "weights").read_text() == "x"
    target = tmp_path / "model"
    assert main([*where, str(target)]) == 0
    (target / "model.safetensors").write_bytes(b"old")
    assert main([*where, str(target)]) == 0
    assert (target / "model.safetensors").stat().st_size > 3


def test_a_diverged_run_saves_no_nan(model_directory, data_directory, tmp_path, capsys):
    """Neither in its checkpoints nor as its best adapter."""
    output = tmp_path / "a"
    status = train(
        model_directory,
        data_directory,
        output,
        *("--steps-per-report", "3", "--steps-per-eval", "1", "--save-every", "1"),
        *("--optimizer", "sgd", "--learning-rate", "1e38", "--scale", "1e3", "--mask", "off"),
    )
    assert status == 1
    assert "lower the learning rate" in capsys.readouterr().err
    for path in output.rglob("*.safetensors"):
        assert all(mx.isfinite(array).all().item() for array in mx.load(str(path)).values()), path


def test_an_earlier_run_stays_if_the_new_one_cannot_start(model_directory, data_directory, adapter, tmp_path):
    import shutil

    output = tmp_path / "a"
    shutil.copytree(adapter, output)
    before = sorted(str(p.relative_to(output)) for p in output.rglob("*"))
    for flags in (
        ["--report-to", "nothing"],
        ["--resume-adapter-file", str(tmp_path / "none")],
        ["--keys", "mlp.none"],
        ["--optimizer", "adafactor", "--config", str(tmp_path / "bad.yaml")],
    ):
        (tmp_path / "bad.yaml").write_text("optimizer_config: {adafactor: {nothing: 1}}")
        assert train(model_directory, data_directory, output, *flags) == 2, flags
        assert sorted(str(p.relative_to(output)) for p in output.rglob("*")) == before


def test_the_best_of_a_run_stopped_early_is_kept(model_directory, data_directory, tmp_path):
    """The run had validated but not saved when it was stopped."""
    output = tmp_path / "a"
    assert train(model_directory, data_directory, output) == 0
    for name in ("adapters.safetensors", "adapter_config.json", "metrics.jsonl"):
        (output / name).unlink()
    best = (output / "best" / "adapters.safetensors").read_bytes()
    assert train(model_directory, data_directory, output, "--seed", "5") == 0
    assert (output / "previous" / "1" / "best" / "adapters.safetensors").read_bytes() == best


def test_more_bad_input(model_directory, data_directory, fused, adapter, tmp_path):
    model = ["--model", model_directory]
    data = ["--data", data_directory]
    refused(["nalora_mlx.generate", *model, "--max-tokens", "abc"], "invalid int value: .abc.")
    refused(
        ["nalora_mlx.generate", *model, "--chat-template-config", "{x"],
        "--chat-template-config: not valid JSON",
    )
    refused(["nalora_mlx.generate", *model, "--prompt-cache-file", "none"], "--prompt-cache-file none")
    refused(["nalora_mlx.generate", *model, "--draft-model", "./none"], "--draft-model ./none")
    half = tmp_path / "half"
    half.mkdir()
    (half / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    refused(["nalora_mlx.generate", *model, "--adapter-path", half], "has no adapters.safetensors")
    (half / "adapters.safetensors").write_bytes(b"x")
    content = json.loads((adapter / "adapter_config.json").read_text())
    (half / "adapter_config.json").write_text(json.dumps(content | {"num_layers": "16"}))
    refused(["nalora_mlx.lora", "--test", *model, *data, "--adapter-path", half], "num_layers is '16'")
    missing = ["--resume-adapter-file", tmp_path / "none"]
    refused(
        ["nalora_mlx.lora", "--train", *model, *data, *missing],
        "--resume-adapter-file .*no adapters.safetensors",
    )


def test_resume_adapter_file_takes_a_directory(model_directory, data_directory, adapter, tmp_path, capsys):
    assert train(model_directory, data_directory, tmp_path / "b", "--resume-adapter-file", str(adapter)) == 0
    assert f"starting from {adapter / 'adapters.safetensors'}" in capsys.readouterr().out


def test_an_empty_directory_is_not_a_model(data_directory, tmp_path):
    refused(
        ["nalora_mlx.lora", "--train", "--model", tmp_path, "--data", data_directory], "has no config.json"
    )


def test_debug_shows_the_traceback(data_directory):
    done = run("nalora_mlx.lora", "--train", "--model", "./nowhere", "--data", data_directory, "--debug")
    assert "Traceback" in done.stderr
