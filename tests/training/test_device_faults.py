"""Failures of a GPU or of its memory: MLX's texts, and the line that the commands print."""

import re
import threading
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from nalora_mlx import cli
from nalora_mlx.__main__ import main
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.device_faults import FAULTS, OUT_OF_MEMORY, find_fault
from nalora_mlx.core.errors import RunError
from nalora_mlx.training.device_faults import explain_device_faults, remedy
from nalora_mlx.training.step import TrainingStep


def metal(text):
    """Return what MLX raises when a command buffer fails with this text of macOS (metal/device.cpp)."""
    return f"[METAL] Command buffer execution failed: {text}."


WATCHDOG = metal("Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)")
# MLX's messages, and a part of the cause: the formats are those of MLX 0.32, the texts within those of macOS and CUDA.
MESSAGES = [
    ("[malloc] Unable to allocate 123 bytes.", "out of memory"),
    (metal("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"), "out of memory"),
    ("cudaMallocAsync(&data, size, stream) failed: out of memory", "out of memory"),
    ("cudaMallocManaged(&data, size) failed: out of memory", "out of memory"),
    ("cublasLtCreate(&handle) failed with code: 3.", "out of memory"),
    ("cudnnExecute(handle) failed: CUDNN_STATUS_ALLOC_FAILED.", "out of memory"),
    (
        "[metal::malloc] Attempting to allocate 48736917632 bytes which is greater than the maximum allowed buffer "
        "size of 30150672384 bytes.",
        "one array would be larger than the GPU allows",
    ),
    ("[metal::malloc] Resource limit (499000) exceeded.", "too many arrays at once"),
    (WATCHDOG, "macOS ended work on the GPU that blocked the screen for too long"),
    (
        metal("Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"),
        "macOS ended work",
    ),
    (metal("Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)"), "macOS ended work"),
    (
        metal(
            "Ignored (for causing prior/excessive GPU errors) "
            "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)"
        ),
        "macOS discarded work on the GPU after an earlier GPU error",
    ),
    (
        metal(
            "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)"
        ),
        "macOS discarded work",
    ),
    (
        metal("Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault)"),
        "a GPU kernel accessed memory that it may not",
    ),
    (
        metal("Invalid Resource (00000009:kIOGPUCommandBufferCallbackErrorInvalidResource)"),
        "a GPU kernel accessed memory that it may not",
    ),
    (
        "cudaStreamSynchronize(stream_) failed: an illegal memory access was encountered",
        "a GPU kernel accessed memory",
    ),
    (
        "cudaGraphLaunch(graph_exec, stream_) failed: unspecified launch failure",
        "a GPU kernel accessed memory that it may not",
    ),
    (
        "cudaStreamSynchronize(stream_) failed: the launch timed out and was terminated",
        "the driver ended work",
    ),
    (
        "Cache thrashing is happening, please set the environment variable MLX_CUDA_GRAPH_CACHE_SIZE to a larger value "
        "than 400 to fix degraded performance.",
        "MLX's cache of CUDA graphs or plans is too small",
    ),
    ("Failed to compile kernel: module.cu(3): error: identifier undefined.", "MLX cannot compile a kernel"),
    ("Failed to load compiled fused kernel: ptxas fatal.", "MLX cannot compile a kernel"),
    (
        "nvrtcCompileProgram(prog, args.size(), args.data()) failed: NVRTC_ERROR_COMPILATION",
        "MLX cannot compile a kernel",
    ),
    (
        "[metal::Device] Unable to build metal library from source\nprogram_source:3: error",
        "MLX cannot compile a kernel",
    ),
    ("[metal::Device] Unable to load kernel fused\n", "MLX cannot compile a kernel"),
    (
        "cudaGraphLaunch(graph_exec, stream_) failed: no kernel image is available for execution on the device",
        "MLX cannot compile a kernel",
    ),
    (
        "[Compile::eval_cpu] Failed to compile function fused: g++: not found",
        "MLX cannot compile code for this CPU",
    ),
    (metal("Internal Error (00000001:kIOGPUCommandBufferCallbackErrorUnknown)"), "work on the GPU failed"),
    ("cublasLtMatmul(handle_, matmul_desc_) failed with code: 13.", "work on the GPU failed"),
    ("cudaMemcpyAsync(data, buf.data) failed: invalid argument", "work on the GPU failed"),
]
UNRELATED = [
    RuntimeError("shapes do not match"),
    RuntimeError("Cannot enqueue work after stream is stopped."),
    RuntimeError("the custom step (a hook) failed: no idea"),
    ValueError("[Primitive::vjp] Not implemented for CustomKernel."),
    RuntimeError("invalid resource id"),
    RuntimeError("unable to allocate token id 5"),
    RuntimeError("The server ran out of memory quota"),
    RuntimeError("Unable to load function from checkpoint"),
    OSError(28, "out of memory"),
]


def command(model_directory, data_directory, output, *flags):
    where = ["--model", model_directory, "--data", data_directory, "--adapter-path", output]
    small = ["--batch-size", "2", "--iters", "4", "--val-batches", "1"]
    return ["lora", "--train", *map(str, where), *small, *map(str, flags)]


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def fail_at(monkeypatch, number, error):
    """Let call `number` of the training step raise an error; return a list that grows by one item with each call."""
    step, calls = TrainingStep.__call__, []

    def fail(*arguments, **more):
        calls.append(1)
        if len(calls) == number:
            raise error
        return step(*arguments, **more)

    monkeypatch.setattr(TrainingStep, "__call__", fail)
    return calls


# --- what the messages mean ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("message", "cause"), MESSAGES)
def test_every_command_prints_one_line_with_cause_and_remedy(message, cause, capsys):
    parser = cli.Parser
    assert (
        cli.execute("nalora generate", lambda prog: parser(prog=prog), failing(RuntimeError(message)), [])
        == 1
    )
    (line,) = capsys.readouterr().err.splitlines()
    fault = find_fault(RuntimeError(message))
    assert line.startswith(f"nalora generate: failed: {cause}")
    assert line.endswith(f"({message.strip().splitlines()[0]}); {fault.remedy}")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        cli.execute(
            "nalora generate", lambda prog: parser(prog=prog), failing(RuntimeError(message)), ["--debug"]
        )


def test_every_kind_of_failure_has_a_message():
    assert {find_fault(RuntimeError(message)) for message, _ in MESSAGES} == set(FAULTS)
    assert find_fault(MemoryError("std::bad_alloc")) is OUT_OF_MEMORY


@pytest.mark.parametrize("error", UNRELATED, ids=str)
def test_other_errors_pass_through(error, tmp_path, capsys):
    assert find_fault(error) is None
    explained = explain_device_faults(RunConfig(), tmp_path, False, None, threading.Event())
    with pytest.raises(type(error), match=re.escape(str(error))), explained:
        raise error
    assert cli.execute("nalora fuse", lambda prog: cli.Parser(prog=prog), failing(error), []) == 1
    assert f"{error} ({type(error).__name__}; --debug shows where)" in capsys.readouterr().err


# --- in training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("message", "cause"), MESSAGES)
def test_the_checkpoint_of_this_run_is_named_and_no_other(message, cause, tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")

    def line(started, config, start=None):
        event = threading.Event()
        if started:
            event.set()
        with pytest.raises(RunError) as raised, explain_device_faults(config, tmp_path, False, start, event):
            raise RuntimeError(message)
        return str(raised.value)

    plain, resumed = RunConfig(batch_size=4), RunConfig(batch_size=4, resume="auto")
    assert line(False, plain).startswith(cause)
    assert str(tmp_path) not in line(False, plain)  # the directory may hold another run
    assert str(tmp_path) not in line(
        False, plain, checkpoint
    )  # starts from weights, with --resume-adapter-file
    assert f"{checkpoint} is complete" in line(True, plain)
    assert f"{checkpoint} is complete" in line(False, resumed, checkpoint)
    fault = find_fault(RuntimeError(message))
    if fault.retry:
        assert fault.remedy in line(True, plain)
        assert "continue with --resume" in line(True, plain)
    else:
        assert "continue with --resume --resume-anyway and --batch-size 2" in line(True, plain)


def test_what_helps_depends_on_the_failure():
    config = RunConfig(batch_size=4)
    flags = {
        message: remedy(find_fault(RuntimeError(message)), config, False, None) for message, _ in MESSAGES
    }
    assert flags["[malloc] Unable to allocate 123 bytes."] == (
        "try --batch-size 2 or --grad-checkpoint or --max-seq-length 1024 or --quantize 4 or --num-layers 8"
    )
    assert flags["[metal::malloc] Resource limit (499000) exceeded."] == (
        "try --batch-size 2 or --grad-checkpoint or --max-seq-length 1024"
    )
    assert flags[WATCHDOG].startswith("switch the display off (pmset displaysleepnow)")
    assert flags[WATCHDOG].endswith(", or try --batch-size 2 or --max-seq-length 1024")


def test_a_run_that_the_watchdog_ends_is_resumed(
    model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "a"
    calls = fail_at(monkeypatch, 4, RuntimeError(WATCHDOG))
    assert main(command(model_directory, data_directory, output, "--save-every", "1", "--iters", "6")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    checkpoint = output / "checkpoints" / "step-0000003"
    assert line.startswith(
        f"nalora lora: failed: macOS ended work on the GPU that blocked the screen for too long ({WATCHDOG})"
    )
    assert line.endswith(
        f"; {checkpoint} is complete: continue with --resume, or --resume --resume-anyway and --batch-size 1"
    )
    assert main(command(model_directory, data_directory, output, "--resume", "--iters", "6")) == 0
    assert len(calls) == 4 + 3


def test_nothing_is_saved_after_a_failure_that_no_read_has_shown(
    model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    output, checkpoints, synchronize = tmp_path / "a", tmp_path / "a" / "checkpoints", mx.synchronize
    calls = fail_at(monkeypatch, None, None)

    def fail(*stream):
        if len(calls) > 3:
            raise RuntimeError(WATCHDOG)
        synchronize(*stream)

    monkeypatch.setattr(mx, "synchronize", fail)
    assert main(command(model_directory, data_directory, output, "--save-every", "2", "--iters", "6")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{checkpoints / 'step-0000002'} is complete: continue with --resume" in line
    assert [path.name for path in checkpoints.iterdir()] == ["step-0000002"]


@pytest.mark.parametrize(
    "error", [RuntimeError("[malloc] Unable to allocate 123 bytes."), MemoryError()], ids=repr
)
def test_out_of_memory_is_one_line_with_the_flags_that_help(
    error, model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(TrainingStep, "__call__", failing(error))
    assert main(command(model_directory, data_directory, tmp_path / "a")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nalora lora: failed: out of memory (")
    assert "try --batch-size 1 or --grad-checkpoint or --max-seq-length 1024 or --quantize 4" in line


def test_out_of_memory_later_names_a_checkpoint_and_compatible_flags(
    model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "a"
    calls = fail_at(monkeypatch, 4, RuntimeError("[malloc] Unable to allocate 123 bytes."))
    assert main(command(model_directory, data_directory, output, "--save-every", "1", "--iters", "6")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    checkpoint = output / "checkpoints" / "step-0000003"
    advice = "continue with --resume --resume-anyway and --batch-size 1 or --grad-checkpoint"
    assert line.endswith(f"); {checkpoint} is complete: {advice}")
    # The advice works. Once the settings cannot get smaller, it names the adapter instead.
    flags = ["--resume", "--resume-anyway", "--batch-size", "1", "--grad-checkpoint", "--iters", "6"]
    assert main(command(model_directory, data_directory, output, *flags)) == 0
    calls[:] = [1] * 3
    assert main(command(model_directory, data_directory, output, *flags[2:])) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--resume" not in line  # the previous run was moved aside, and this one has no checkpoint
    assert "try --max-seq-length 1024 or --quantize 4" in line
    calls[:] = [1] * 2
    flags += ["--save-every", "1", "--max-seq-length", "200"]
    assert main(command(model_directory, data_directory, output, *flags[2:])) == 1
    (line,) = capsys.readouterr().err.splitlines()
    checkpoint = output / "checkpoints" / "step-0000001"
    assert line.endswith(
        f"{checkpoint} is complete: start from its adapter with --resume-adapter-file {checkpoint} and --quantize 4"
    )
    monkeypatch.undo()
    flags = ["--resume-adapter-file", checkpoint]
    assert main(command(model_directory, data_directory, tmp_path / "b", *flags)) == 0


def test_out_of_memory_advice_is_never_empty_and_quantizes_once():
    small = RunConfig(batch_size=1, grad_checkpoint=True, max_seq_length=200, num_layers=4)
    assert remedy(OUT_OF_MEMORY, small, True, None) == "try a smaller --model"
    assert remedy(OUT_OF_MEMORY, small, False, None) == "try --quantize 4"
    assert remedy(OUT_OF_MEMORY, small, True, Path("x")).endswith(
        "--resume-adapter-file x and a smaller --model"
    )


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "[malloc] Unable to allocate 123 bytes.",
            "out of memory while loading ([malloc] Unable to allocate 123 bytes.); use a smaller model, or a quantized",
        ),
        (WATCHDOG, f"blocked the screen for too long while loading ({WATCHDOG}); switch the display off"),
    ],
    ids=["memory", "watchdog"],
)
def test_failures_while_loading_the_model(
    message, line, model_directory, data_directory, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("mlx_lm.utils.load_model", failing(RuntimeError(message)))
    assert main(command(model_directory, data_directory, tmp_path / "a")) == 1
    assert line in capsys.readouterr().err


# --- in the server ------------------------------------------------------------------------------------------


def test_the_server_says_why_it_answers_no_more(monkeypatch, capsys, caplog):
    from nalora_mlx.serve.server import Generator, Provider

    generator = Generator.__new__(Generator)  # without its thread
    monkeypatch.setattr(generator, "_generate", failing(RuntimeError(WATCHDOG)))
    generator._run_generate()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nalora serve: failed: macOS ended work on the GPU")
    assert line.endswith("; then start it again")
    assert generator._generation_failed
    monkeypatch.setattr(generator, "_generate", failing(KeyError("some fault of ours")))
    generator._run_generate()
    assert "some fault of ours" in caplog.text  # with its traceback

    provider = Provider.__new__(Provider)
    provider.served, provider.cli_args = SimpleNamespace(base="model"), SimpleNamespace(draft_model=None)
    monkeypatch.setattr(provider, "_load", failing(RuntimeError(WATCHDOG)))
    with pytest.raises(RuntimeError, match="Impacting Interactivity"):  # not bad input
        provider._read("--model model", None)
