"""nalora doctor: its findings on machines, models and data, and its exit status."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from rich.console import Console

from nalora_mlx import doctor
from nalora_mlx.__main__ import main
from nalora_mlx.core import machine, optional_dependencies
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.terminal import Page
from tests.adapters.test_miniatures import ZOO, build

SMALL = ["--batch-size", "2", "--max-seq-length", "32"]
HEADINGS = ["Machine", "Kernels", "Model", "Data", "Memory", "Disk", "Extras"]


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch):
    """No findings about the machine, whichever it is."""
    monkeypatch.setattr(machine, "matmul_gflops", lambda: 100.0)
    monkeypatch.setattr(machine, "has_cpp_compiler", lambda: True)


def page_of(capsys, *flags, status=0):
    """Return {heading: lines} of the page and what was printed to stderr. Every line has a mark."""
    assert main(["doctor", *map(str, flags)]) == status
    done = capsys.readouterr()
    sections, blocks = {}, done.out.strip("\n").split("\n\n")
    for block in blocks[:-1]:
        heading, *lines = block.splitlines()
        sections[heading] = lines
    sections["verdict"] = blocks[-1].splitlines()
    assert list(sections) == [*HEADINGS, "verdict"]
    for lines in sections.values():
        assert all(re.match(r"  [✓·!✗] \S| {6}", line) for line in lines), lines
    return sections, done.err


def test_the_page_without_model_and_data(capsys):
    sections, err = page_of(capsys)
    assert sections["Machine"][-1] == "  ✓ float32 matrix products: 100 GFLOP/s"
    assert sections["Model"] == ["  · none given; --model M shows what NA-LoRA would adapt"]
    assert re.match(
        r"  · this machine has [\d.]+ GB; a run should stay within [\d.]+ GB", sections["Memory"][0]
    )
    assert re.match(r"  ✓ [\d.]+ GB free for adapters", sections["Disk"][0])
    assert sections["verdict"] == ["  ✓ no findings"]
    assert err == ""


def test_the_page_of_a_run(model_directory, data_directory, capsys):
    data = ["--data", data_directory, "--mask-prompt"]
    sections, err = page_of(capsys, "--model", model_directory, *data, *SMALL)
    assert re.match(r"  ✓ loaded: 3 layers, 0\.00 GB of weights", sections["Model"][0])
    assert sections["Model"][1] == "  ✓ model.layers.0-2.mlp: silu (gate_proj, up_proj, down_proj): NA-LoRA"
    assert sections["Model"][2].startswith("  · 3 layers adapted, 12 other modules; keys: ")
    assert any(re.match(r"  ✓ train: 9 rows, \d+ tokens", line) for line in sections["Data"])
    assert re.match(
        r"  ✓ at most [\d.]+ GB for the largest batch, 2 x \d+ tokens: fits; ", sections["Memory"][1]
    )
    assert "10 checkpoints of " in sections["Disk"][0]
    # The rows of valid and test are in train too.
    assert sections["verdict"] == ["  ! 2 findings, none that keeps a run from starting"]
    assert err == ""


def test_the_memory_plan_is_that_of_lora_plan(model_directory, data_directory, tmp_path, capsys):
    """What may not fit is measured, in doctor too."""
    flags = ["--model", model_directory, "--data", data_directory, *SMALL, "--grad-checkpoint"]
    sections, _ = page_of(capsys, *flags, "--memory-budget", "10KB")
    place = ["--adapter-path", str(tmp_path / "a")]
    assert main(["lora", "--plan", *map(str, flags), *place, "--memory-budget", "10KB"]) == 0
    want = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: "))
    ours = sections["Memory"][1].removeprefix("  ! finding: ").partition("; what would fit")[0]
    want = want.removeprefix("memory: ")

    def shape(line):
        return re.sub(r"about [\d.]+ GB", "", line)

    assert shape(ours) == shape(want)
    assert not any("with --grad-checkpoint" in line for line in sections["Memory"])


def test_memory_without_data_assumes_full_rows_and_too_little_is_a_finding(model_directory, capsys):
    sections, _ = page_of(capsys, "--model", model_directory, *SMALL, "--memory-budget", "1000")
    assert (
        sections["Memory"][1]
        == "  · without --data, all rows are assumed to have 32 tokens (--max-seq-length)"
    )
    assert re.match(
        r"  ! finding: about .* 2 rows of 32 tokens; .*does not fit; what would fit: ",
        sections["Memory"][2],
    )
    assert sections["verdict"] == ["  ! 1 finding, none that keeps a run from starting"]


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


def test_settings_come_from_a_config_file(model_directory, data_directory, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {model_directory}\ndata: {data_directory}\nbatch_size: 3\nnum_layers: 2\n"
        "lora_parameters: {rank: 4, keys: [mlp.gate_proj, self_attn.q_proj]}\n"
    )
    sections, _ = page_of(capsys, "--config", config)
    assert sections["Model"][1] == "  ✓ model.layers.1-2.mlp: silu (gate_proj, up_proj, down_proj): NA-LoRA"
    assert (
        sections["Model"][2] == "  · 2 layers adapted, 2 other modules; keys: mlp.gate_proj, self_attn.q_proj"
    )
    assert "3 x 24 tokens" in sections["Memory"][1]


def test_keys_left_out_by_default_are_listed_with_the_reason(
    tokenizer_directory, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(doctor, "_check_memory", lambda *_: None)  # trains, which takes long
    directory = tmp_path / "hybrid"
    shutil.copytree(tokenizer_directory, directory)
    model = build("qwen3_next")
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(ZOO["qwen3_next"].config))
    sections, _ = page_of(capsys, "--model", directory)
    assert sections["Model"][-1] == (
        "  · left out by default: linear_attn.in_proj_ba (gates of the recurrence); "
        "mlp.gate, mlp.shared_expert_gate (routers)"
    )
    sections, _ = page_of(capsys, "--model", directory, "--keys", "mlp.gate_proj", "linear_attn.in_proj_ba")
    assert not any("left out" in line for line in sections["Model"])


def test_an_adapter_without_gates_is_a_finding(model_directory, capsys):
    sections, _ = page_of(capsys, "--model", model_directory, *SMALL, "--keys", "self_attn.q_proj")
    assert any("! finding: " in line and "acts nowhere" in line for line in sections["Model"])


def test_all_problems_are_on_one_page(tmp_path, capsys):
    """A missing model and bad rows are both reported, and the rest of the page is complete."""
    (tmp_path / "train.jsonl").write_text('{"prompt": \n' + json.dumps({"text": "a"}) + "\n")
    sections, err = page_of(capsys, "--model", "./nowhere", "--data", tmp_path, status=2)
    assert sections["Model"][0].startswith("  ✗ finding: --model ./nowhere: no such directory")
    assert any(re.match(r"  ✗ finding: .*train.jsonl:1: not valid JSON", line) for line in sections["Data"])
    assert sections["verdict"] == ["  ✗ 2 findings that keep a run from starting, no others"]
    assert err == "nalora doctor: error: 2 findings that keep a run from starting; see above\n"
    sections, err = page_of(capsys, "--data", tmp_path / "none", status=2)
    assert "1 finding that keeps a run from starting" in err


def test_a_full_disk_prevents_a_run(model_directory, capsys, monkeypatch):
    from nalora_mlx.core import storage

    monkeypatch.setattr(storage, "free_space", lambda _: 10**9)
    sections, _ = page_of(capsys)
    assert sections["Disk"][0].startswith("  ! finding: 1.0 GB free for adapters")
    monkeypatch.setattr(storage, "free_space", lambda _: 1000)
    sections, _ = page_of(capsys, "--model", model_directory, *SMALL, status=2)
    assert re.match(r"  ✗ finding: adapters: .* free, but a checkpoint", sections["Disk"][0])


def test_a_slow_machine_gets_remedies(capsys, monkeypatch):
    monkeypatch.setattr(machine, "matmul_gflops", lambda: 3.0)
    monkeypatch.setattr(machine, "has_cpp_compiler", lambda: False)
    sections, _ = page_of(capsys)
    assert [line[:13] for line in sections["Machine"][2:]] == ["  ! finding: ", "  ! finding: "]
    assert "LD_PRELOAD" in sections["Machine"][2]
    assert "Install g++" in sections["Machine"][3]


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
    assert re.fullmatch(
        r"  · compiling \d+ kernels, which takes longer the first time", sections["Kernels"][0]
    )
    assert sections["Kernels"][1] == "  · gated residual: 63 of 72 metal kernels agree with MLX"
    assert len(sections["Kernels"]) == 11
    for line in sections["Kernels"][2:]:
        assert re.match(r"  ✗ finding: the metal kernel of relu, .* is not used, since a result is off", line)
    assert sections["verdict"] == ["  ✗ 9 failed checks, no others"]
    assert err == "nalora doctor: failed: 9 failed checks; see above\n"
    sections, _ = page_of(capsys, "--data", tmp_path / "none", status=1)
    assert sections["verdict"] == [
        "  ✗ 9 failed checks and 1 finding that keeps a run from starting, no others"
    ]


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
    doctor._check_machine(Page(Console(highlight=False)))
    _, device, precision = capsys.readouterr().out.splitlines()
    assert device.startswith("  · GPU: Apple M5, ")
    assert "11 bits" in precision
    assert "MLX_ENABLE_TF32=0" in precision
    assert "compiling kernels for this GPU" in compile_notices()[0]


def test_the_chip_is_named(capsys):
    sections, _ = page_of(capsys)
    assert sections["Machine"][1].startswith(f"  · CPU: {mx.device_info()['device_name']}")


def test_rounded_products_are_noticed(monkeypatch):
    assert not machine.rounds_float32_products()
    full = mx.full
    monkeypatch.setattr(mx, "full", lambda shape, value: full(shape, value).astype(mx.bfloat16))
    assert machine.rounds_float32_products()


def test_missing_extras_come_with_their_install_command(capsys, monkeypatch):
    monkeypatch.setattr(optional_dependencies, "is_installed", lambda package: package == "gguf")
    sections, _ = page_of(capsys)
    assert sections["Extras"][0] == "  ✓ installed: export"
    assert sections["Extras"][1].endswith(
        "; pip install 'nalora-mlx[data,kquants,report,tensorboard,vlm,notebook]'"
    )


def test_extras_are_those_of_pyproject():
    declared = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    device, developers = {"cpu", "cuda"}, {"peft", "interop", "browser", "dev"}
    assert set(optional_dependencies.EXTRAS) == set(declared) - device - developers
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
    assert sections["Extras"][1].endswith("pip install 'nalora-mlx[notebook]'")


def test_doctor_runs_from_a_source_tree(capsys, monkeypatch):
    def missing(name):
        raise optional_dependencies.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(optional_dependencies.importlib.metadata, "requires", missing)
    sections, _ = page_of(capsys)
    assert "not installed: data (Parquet" in sections["Extras"][0]


def test_bad_settings_are_an_error_before_the_page(capsys):
    assert main(["doctor", "--batch-size", "0"]) == 2
    done = capsys.readouterr()
    assert done.out == ""
    assert "batch_size is 0" in done.err


def test_long_lines_are_indented_on_a_terminal(capsys):
    console = Console(force_terminal=True, width=40, color_system=None)
    page = Page(console)
    with page.section("Data"):
        page.good("short")
        page.finding("word " * 12)
        raise InputError("a problem")
    with pytest.raises(InputError, match="1 finding that keeps a run from starting; see above"):
        page.verdict()
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines] == [
        "",
        "Data",
        "  ✓ short",
        "  ! finding: word word word word word",
        "    word word word word word word word",
        "  ✗ finding: a problem",
        "",
        "  ✗ 1 finding that keeps a run from",
        "    starting, 1 other",
    ]
