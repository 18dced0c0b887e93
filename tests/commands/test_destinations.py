"""`--ollama` and `--lmstudio` of nalora export gguf, and `--push-to-hub`: what is checked, written, run and kept."""

import json
import os
import shlex
import shutil
import stat
import sys
from pathlib import Path

import pytest
import yaml
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt, adapt_dora
from nalora_mlx.adapters.files import adapter_config, adapter_files
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.export import lmstudio
from nalora_mlx.export.upload import upload_adapter
from nalora_mlx.models import loading
from nalora_mlx.models.stored_tensors import format_bytes
from tests.conftest import random_adapters
from tests.interop import gguf_models

FAKE_OLLAMA = """#!{python}
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps({{"argv": sys.argv[1:], "cwd": os.getcwd()}}) + "\\n")
if sys.argv[1] == "list":
    if (here / "stopped").exists():
        sys.exit("Error: could not connect to ollama app, is it running?")
    print("NAME  ID  SIZE  MODIFIED\\nTaken:latest  ab12  1 GB  now\\nme/other:8b  cd34  1 GB  now")
else:
    model = pathlib.Path(sys.argv[sys.argv.index("-f") + 1]).read_text().split("FROM ")[1].split()[0]
    sys.exit(0 if pathlib.Path(model).read_bytes()[:4] == b"GGUF" and sys.argv[2] != "broken" else "Error: no model")
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    pytest.importorskip("gguf")
    model, config = gguf_models.build("llama", num_hidden_layers=2)
    return gguf_models.save(tmp_path_factory.mktemp("base") / "model", model, config)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(base, tmp_path_factory.mktemp("adapter") / "run")


def save_adapter(base, directory, attach=adapt):
    model, _ = load(str(base))
    attach(model, NALoRAConfig(num_layers=-1, rank=4, scale=3.0))
    random_adapters(model)
    storage.write_directory(directory, adapter_files(model, adapter_config(model)))
    return directory


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Return a home directory without LM Studio, and no program on PATH."""
    directory = tmp_path / "home"
    directory.mkdir()
    monkeypatch.setenv("HOME", str(directory))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return directory


@pytest.fixture
def ollama(user, tmp_path):
    """Put a program named ollama on PATH; return its directory, where it records its calls."""
    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text(FAKE_OLLAMA.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program.parent


def calls(ollama):
    path = ollama / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def export(base, *flags):
    return main(["export", "gguf", "--model", str(base), *map(str, flags)])


def everything(directory):
    return sorted(path for path in Path(directory).rglob("*") if path.name != "calls.jsonl")


# --- Ollama -------------------------------------------------------------------------------------------------


def test_ollama_creates_the_model(base, adapter, ollama, tmp_path, capfd):
    output = tmp_path / "out" / "tuned.gguf"
    assert export(base, "--adapter-path", adapter, "--output", output, "--ollama", "me/tuned:8b") == 0
    create = ["create", "me/tuned:8b", "-f", "tuned.gguf.Modelfile"]
    assert [call["argv"] for call in calls(ollama)] == [["list"], create]
    assert calls(ollama)[1]["cwd"] == str(output.parent)  # FROM ./tuned.gguf is relative
    done = capfd.readouterr()
    assert done.out.splitlines()[2:] == [
        "Ollama has it as me/tuned:8b",
        "",
        "next:",
        "  Ollama  ollama run me/tuned:8b",
    ]


def test_ollama_is_asked_before_the_export(base, ollama, tmp_path, capsys, monkeypatch):
    before = everything(tmp_path)
    output = ["--output", tmp_path / "new.gguf", "--ollama"]
    for name, message in (
        ("taken", "--ollama taken: Ollama has a model of this name; choose another, or give --overwrite"),
        ("ME/other:8B", "Ollama has a model of this name"),
        ("a b", "not a name for a model of Ollama"),
        ("../x", "not a name for a model of Ollama"),
    ):
        assert export(base, *output, name) == 2
        assert message in capsys.readouterr().err
    (ollama / "stopped").touch()
    assert export(base, *output, "new") == 2
    assert "could not connect to ollama app, is it running?); start Ollama" in capsys.readouterr().err
    (ollama / "stopped").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert export(base, *output, "new") == 2
    assert "--ollama new: there is no ollama on PATH; install it" in capsys.readouterr().err
    assert everything(tmp_path) == before
    assert all(call["argv"] == ["list"] for call in calls(ollama))


def test_an_existing_model_of_ollama_is_replaced_on_request(base, ollama, tmp_path):
    output = ["--output", tmp_path / "new.gguf", "--ollama", "taken", "--overwrite"]
    assert export(base, *output) == 0
    assert calls(ollama)[-1]["argv"][:2] == ["create", "taken"]
    assert export(base, *output[:2], "--ollama", "other:8b", "--overwrite") == 0  # me/other:8b is another


def test_a_failure_of_ollama_keeps_the_files(base, ollama, tmp_path, capfd):
    output = tmp_path / "new.gguf"
    assert export(base, "--output", output, "--ollama", "broken") == 1
    error = capfd.readouterr().err
    assert "ollama create broken -f new.gguf.Modelfile failed with status 1, see above" in error
    assert f"the files are in {tmp_path}" in error
    assert output.exists()
    assert (tmp_path / "new.gguf.Modelfile").exists()


# --- LM Studio ----------------------------------------------------------------------------------------------


def test_lmstudio_gets_the_model_in_its_layout(base, adapter, user, capsys):
    assert export(base, "--adapter-path", adapter, "--lmstudio", "me/tuned", "--type", "q8_0") == 0
    path = user / ".lmstudio" / "models" / "me" / "tuned" / "tuned-Q8_0.gguf"
    assert path.read_bytes()[:4] == b"GGUF"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    done = capsys.readouterr()
    assert f"LM Studio has it as me/tuned ({path})" in done.out
    assert "ollama" not in done.out
    assert "LM Studio was not found" in done.err
    content = path.read_bytes()
    assert export(base, "--lmstudio", "me/tuned", "--type", "q8_0") == 2
    assert "tuned-Q8_0.gguf exists; choose another NAME, or give --overwrite" in capsys.readouterr().err
    assert path.read_bytes() == content
    assert export(base, "--lmstudio", "me/tuned") == 0  # another type is another file
    assert export(base, "--lmstudio", "me/tuned", "--type", "q8_0", "--overwrite") == 0
    assert path.read_bytes() != content  # without the adapter
    assert "LM Studio was not found" not in capsys.readouterr().err


@pytest.mark.parametrize("links", [True, False])
def test_output_and_lmstudio_together(base, user, ollama, tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another file system")))
    output = tmp_path / "out.gguf"
    assert export(base, "--output", output, "--lmstudio", "me/tuned", "--ollama", "tuned") == 0
    path = user / ".lmstudio" / "models" / "me" / "tuned" / "tuned-F16.gguf"
    assert path.read_bytes() == output.read_bytes()
    assert os.path.samefile(path, output) == links
    assert calls(ollama)[-1]["cwd"] == str(tmp_path)
    assert (tmp_path / "out.gguf.Modelfile").exists()


def test_where_lmstudio_keeps_its_models(user, tmp_path):
    assert lmstudio.models_directory() == user / ".lmstudio" / "models"
    older = user / ".cache" / "lm-studio"
    older.mkdir(parents=True)
    assert lmstudio.models_directory() == older / "models"
    moved = tmp_path / "moved"
    moved.mkdir()
    (user / ".lmstudio-home-pointer").write_text(f"{moved}\n")
    assert lmstudio.models_directory() == moved / "models"
    for text in ('{"downloadsFolder": 5}', "{", "{}"):
        (moved / "settings.json").write_text(text)
        assert lmstudio.models_directory() == moved / "models"
    (moved / "settings.json").write_text(json.dumps({"downloadsFolder": str(tmp_path / "disk")}))
    assert lmstudio.model_path("a/b", "q4_k_m") == tmp_path / "disk" / "a" / "b" / "b-Q4_K_M.gguf"


@pytest.mark.parametrize(
    "name", ["tuned", "a/b/c", "/b", "a/", "../b", "a/..", "a/b.", "a/b:c", "a/ b", "a/" + 101 * "b", "~/b?"]
)
def test_names_that_lmstudio_does_not_take(base, user, name, capsys):
    assert export(base, "--lmstudio", name) == 2
    assert f"--lmstudio {name}: give PUBLISHER/NAME" in capsys.readouterr().err
    assert list(user.iterdir()) == []


# --- dry runs and flags -------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_happen_and_writes_nothing(base, adapter, user, tmp_path, capsys):
    before = everything(tmp_path)
    flags = ["--adapter-path", adapter, "--type", "q8_0", "--dry-run"]
    assert export(base, *flags, "--lmstudio", "me/tuned", "--ollama", "tuned") == 0
    path = user / ".lmstudio" / "models" / "me" / "tuned" / "tuned-Q8_0.gguf"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"would write {path}: q8_0, ")
    assert lines[1:] == [
        f"would write {path}.Modelfile",
        f"would run, in {path.parent}: ollama create tuned -f {path.name}.Modelfile "
        "(there is no ollama on PATH; install it first)",
    ]
    output = tmp_path / "out.gguf"
    assert export(base, *flags, "--output", output, "--lmstudio", "me/tuned") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        f"would write {output}.Modelfile",
        f"would make {output} appear as {path}, for LM Studio",
    ]
    assert everything(tmp_path) == before


def test_the_size_of_a_dry_run_is_that_of_the_export(base, user, tmp_path, capsys):
    flags = ["--output", tmp_path / "out.gguf", "--type", "q8_0"]
    assert export(base, *flags, "--dry-run") == 0
    planned = capsys.readouterr().out.splitlines()[0].rpartition(", ")[2]
    assert export(base, *flags) == 0
    gguf = pytest.importorskip("gguf")
    tensors = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert planned == format_bytes(sum(tensor.n_bytes for tensor in tensors))


# --- what is printed ----------------------------------------------------------------------------------------


def test_results_go_to_stdout_and_notes_to_stderr(base, adapter, user, tmp_path, capsys):
    """Files and commands with quoted paths; no note that asks for nothing. Types may be written in capitals."""
    output = tmp_path / "My model (1).gguf"
    quoted = f"'{output}'"
    assert export(base, "--adapter-path", adapter, "--output", output, "--type", "Q4_0") == 0
    done = capsys.readouterr()
    size = format_bytes(output.stat().st_size)
    assert done.out.splitlines() == [
        f"wrote {output}: q4_0, {size}",
        f"wrote {output}.Modelfile: for Ollama",
        "",
        "next:",
        f"  llama.cpp  llama-cli -m {quoted}",
        f"  Ollama     ollama create my-model-1 -f '{output}.Modelfile' && ollama run my-model-1",
        f"  LM Studio  lms import --hard-link {quoted}",
    ]
    # That the output head has more bits asks for nothing.
    guesses = "note: Ollama cannot express the model's chat template and guesses one; check its answers\n"
    assert done.err == guesses
    assert export(base, "--output", output, "--overwrite") == 0
    done = capsys.readouterr()
    assert done.err == f"note: {output.name}.Modelfile exists and was not changed\n"
    assert "note" not in done.out


def test_what_a_gguf_adapter_needs(base, adapter, user, tmp_path, capsys):
    """The base model's GGUF is asked for only if it is not there."""
    output = tmp_path / "lora.gguf"
    flags = ["--model", str(base), "--adapter-path", str(adapter), "--output", str(output)]
    assert main(["export", "gguf-lora", *flags]) == 0
    steps = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    model = tmp_path / "model.gguf"
    assert steps == [
        f"  base model  nalora export gguf --model {base} --output {model}",
        f"  llama.cpp   llama-cli -m {model} --lora {output}",
        f"  Ollama      ollama create lora -f {output}.Modelfile && ollama run lora",
    ]
    assert main(shlex.split(steps[0].removeprefix("  base model  nalora "))) == 0
    capsys.readouterr()
    assert main(["export", "gguf-lora", *flags, "--overwrite"]) == 0
    steps = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    assert [step.split()[0] for step in steps] == ["llama.cpp", "Ollama"]


def test_a_dry_run_refuses_what_the_export_refuses(base, ollama, tmp_path, capsys):
    (tmp_path / "old.gguf").write_text("mine")
    assert export(base, "--output", tmp_path / "old.gguf", "--dry-run") == 2
    assert export(base, "--output", tmp_path / "new.gguf", "--ollama", "taken", "--dry-run") == 2
    assert "Ollama has a model of this name" in capsys.readouterr().err
    config = json.loads((base / "config.json").read_text())
    other = shutil.copytree(base, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    assert export(other, "--output", tmp_path / "new.gguf", "--dry-run") == 2
    assert [call["argv"] for call in calls(ollama)] == [["list"]]


@pytest.mark.parametrize(
    ("format", "flags", "message"),
    [
        ("gguf", [], "--output is missing"),
        ("mlx", ["--adapter-path", "ADAPTER"], "--output is missing"),
        ("mlx", ["--adapter-path", "ADAPTER", "--lmstudio", "a/b"], "--lmstudio a/b: only export gguf takes this flag"),
        ("gguf-lora", ["--adapter-path", "ADAPTER", "--ollama", "a"], "--ollama a: only export gguf takes this flag"),
        ("peft", ["--adapter-path", "ADAPTER", "--dry-run"], "--dry-run: only export gguf takes this flag"),
        ("gguf", ["--output", "x", "--push-to-hub", "a/b"], "--push-to-hub: only export mlx and peft take this flag"),
    ],
)  # fmt: skip
def test_flags_that_a_format_does_not_take(base, adapter, format, flags, message, capsys):
    flags = [str(adapter) if flag == "ADAPTER" else flag for flag in flags]
    assert main(["export", format, "--model", str(base), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("format", ["mlx", "peft", "gguf", "gguf-lora"])
def test_an_output_that_cannot_be_written_is_one_clear_line(
    base, adapter, tmp_path, format, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    flags = ["--model", str(base), "--adapter-path", str(adapter), "--output"]
    assert main(["export", format, *flags, str(tmp_path / "file" / "out")]) == 2
    assert f"{tmp_path / 'file'} is a file; give a directory" in capsys.readouterr().err

    def fail(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", fail)
    assert main(["export", format, *flags, str(tmp_path / "out")]) == 2
    assert "is not writable (Read-only file system); choose another directory" in capsys.readouterr().err


# --- the Hugging Face Hub -----------------------------------------------------------------------------------


def read_card(files):
    """Return the YAML metadata and the text of a card."""
    _, head, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(head), text


LORA = [
    "--iters",
    "4",
    "--batch-size",
    "3",
    "--steps-per-eval",
    "2",
    "--steps-per-report",
    "2",
    "--rank",
    "3",
]


def train(model, data, output, *flags):
    where = ["--model", str(model), "--data", str(data), "--adapter-path", str(output)]
    return main(["lora", "--train", *where, *LORA, *map(str, flags)])


def test_a_run_uploads_its_final_adapter_with_a_card(
    model_directory, data_directory, tmp_path, hub, capsys, monkeypatch
):
    base = shutil.copytree(model_directory, tmp_path / "somewhere" / "base")
    head = "license: apache-2.0\nlibrary_name: mlx\nbase_model: org/small\n"  # as mlx-lm writes it
    (base / "README.md").write_text(f"---\n{head}---\n# Base\n")
    output = tmp_path / "private" / "run"
    assert train(base, data_directory, output, "--test", "--push-to-hub", "me/tuned") == 0
    assert hub.calls[0] == ("create", "me/tuned", True)
    _, repo, files, message = hub.calls[1]
    assert (repo, message) == ("me/tuned", "Upload with nalora lora")
    assert files.keys() == {"adapters.safetensors", "adapter_config.json", "README.md"}
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert files[name] == (output / name).read_bytes()
    metadata, text = read_card(files)
    assert metadata == {
        "base_model": "org/small",
        "base_model_relation": "adapter",
        "library_name": "mlx",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "nalora-mlx", "lora"],
    }
    for part in (
        "trained with NA-LoRA",
        "mlx_lm.generate --model org/small --adapter-path tuned",
        "hf download me/tuned --local-dir tuned",
        "| rank | 3 |",
        "| keys | ",
        "| iters | 4 |",
        "validation loss after",
        "test loss",
    ):
        assert part in text
    assert str(tmp_path) not in text
    assert "private" not in text
    assert not (output / "README.md").exists()
    assert "uploaded to https://huggingface.co/me/tuned" in capsys.readouterr().out


def test_a_failed_upload_keeps_the_run(model_directory, data_directory, tmp_path, hub, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(hub, "upload_folder", fail)
    assert train(model_directory, data_directory, tmp_path / "run", "--push-to-hub", "me/tuned") == 1
    error = capsys.readouterr().err
    assert f"uploading to me/tuned failed (no network); the adapter is in {tmp_path / 'run'}" in error
    assert (tmp_path / "run" / "adapters.safetensors").exists()


def test_an_impossible_upload_is_refused_before_the_work(
    base, adapter, data_directory, tmp_path, hub, monkeypatch, capsys
):
    import huggingface_hub

    export = [
        "export",
        "mlx",
        "--model",
        str(base),
        "--adapter-path",
        str(adapter),
        "--output",
        str(tmp_path / "out"),
    ]
    runs = [
        lambda repo: train(base, data_directory, tmp_path / "run", "--push-to-hub", repo),
        lambda repo: main([*export, "--push-to-hub", repo]),
    ]
    for run in runs:
        assert run("a/b/c") == 2
        assert "--push-to-hub a/b/c: " in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for run in runs:
        assert run("me/tuned") == 2
        assert (
            "--push-to-hub: you are not logged in to Hugging Face; run hf auth login first"
            in capsys.readouterr().err
        )
    assert list(tmp_path.iterdir()) == []
    assert hub.calls == []


def test_nothing_is_uploaded_without_training(model_directory, data_directory, tmp_path, hub, capsys):
    assert (
        train(model_directory, data_directory, tmp_path / "run", "--push-to-hub", "me/tuned", "--plan") == 0
    )
    assert train(model_directory, data_directory, tmp_path / "run") == 0
    where = [
        "--model",
        str(model_directory),
        "--data",
        str(data_directory),
        "--adapter-path",
        str(tmp_path / "run"),
    ]
    assert main(["lora", "--test", *where, "--push-to-hub", "me/tuned"]) == 0
    assert "--push-to-hub has no effect without --train" in " ".join(capsys.readouterr().out.split())
    assert hub.calls == []


@pytest.mark.parametrize("attach", [adapt, adapt_dora])
@pytest.mark.parametrize("format", ["mlx", "peft"])
def test_an_export_uploads_what_it_wrote(base, tmp_path, hub, format, attach):
    adapter = save_adapter(base, tmp_path / "trained", attach)
    output = tmp_path / "out"
    flags = ["--model", str(base), "--adapter-path", str(adapter), "--output", str(output)]
    assert main(["export", format, *flags, "--push-to-hub", "me/tuned"]) == 0
    files = hub.calls[1][2]
    weights = {"mlx": "adapters.safetensors", "peft": "adapter_model.safetensors"}[format]
    assert files.keys() == {weights, "adapter_config.json", "README.md"}
    assert files[weights] == (output / weights).read_bytes()
    metadata, text = read_card(files)
    assert metadata["library_name"] == format
    assert "base_model" not in metadata  # a local base whose origin is unknown
    assert ("lora" in metadata["tags"]) == (attach is adapt)
    assert f"trained with {'NA-LoRA' if attach is adapt else 'DoRA'}" in text
    assert "| rank | 4 |" in text
    assert "| scale | 3.0 |" in text
    assert ("PeftModel.from_pretrained" in text) == (format == "peft")
    assert "self_attn.q_proj" in text
    assert "layers.0" not in text


def test_losses_of_a_run_are_not_those_of_a_scaled_or_summed_adapter(base, adapter, tmp_path, hub):
    records = [{"split": "valid", "step": step, "loss": loss} for step, loss in ((0, 3.0), (9, 2.5))]
    for name in ("a", "b"):
        run = shutil.copytree(adapter, tmp_path / name)
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    one, two = (["--adapter-path", str(tmp_path / name)] for name in ("a", "b"))
    found = []
    for index, flags in enumerate([one, [*one, "--scale", "0.5"], [*one, "--weight", "2"], [*one, *two]]):
        where = ["--model", str(base), "--output", str(tmp_path / f"out{index}"), "--push-to-hub", "me/tuned"]
        assert main(["export", "mlx", *where, *flags]) == 0
        found.append("validation loss after | 2.5000" in read_card(hub.calls[-1][2])[1])
    assert found == [True, False, False, False]


@pytest.mark.parametrize(("format", "named"), [("mlx", "quantizer/small-4bit"), ("peft", "org/small")])
def test_a_card_names_the_base_that_the_adapter_is_for(
    base, adapter, tmp_path, hub, monkeypatch, format, named
):
    """mlx-lm loads the quantized model, PEFT the one in full precision from which mlx-lm converted it."""
    quantized = shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (quantized / "config.json").write_text(
        json.dumps(config | {"quantization": {"bits": 4, "group_size": 64}})
    )
    (quantized / "README.md").write_text("---\nlibrary_name: mlx\nbase_model: org/small\n---\n")
    monkeypatch.setattr(loading, "local_directory", lambda name: quantized)
    where = ["--model", str(base), "--adapter-path", str(adapter), "--output", str(tmp_path / "out")]
    assert main(["export", format, *where]) == 0
    upload_adapter(tmp_path / "out", "me/tuned", "export", model="quantizer/small-4bit")
    metadata, text = read_card(hub.calls[1][2])
    assert metadata["base_model"] == named
    assert f"[{named}](https://huggingface.co/{named})" in text
