"""The documentation: its commands run, its flags, files and links exist, and generated pages are up to date.

The bash blocks of a page run in order, in a directory per page. Placeholders in capitals (MODEL, DATA, RUN ...) exist
there. Names of models on the Hub are replaced by a tiny model, and training takes a few iterations.
"""

import importlib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import mlx.core as mx
import pytest

import nalora_mlx
from nalora_mlx.__main__ import main
from nalora_mlx.arguments import add_common
from nalora_mlx.cli import COMMANDS, command
from tests.conftest import CHAT_TEMPLATE
from tests.interop import gguf_models

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_EXAMPLES = [
    *PAGES,
    *sorted((ROOT / "examples").glob("**/README.md")),
]  # whose links and flags are checked
GENERATED = ("api_reference", "mac_recipes", "method_figures")  # scripts that generate pages or parts of them
SLOW_PAGES = ("getting-started", "migration", "report")  # whose commands take long; other tests run them too

# Lines that no test runs, by how they begin, and why.
NOT_RUN = {
    "pip": "installs",
    "pipx": "installs",
    "uv": "installs",
    "brew": "installs",
    "apt": "installs",
    "sudo": "installs",
    "git clone": "needs the network",
    "python3 -m venv": "creates an environment",
    "source": "changes the shell",
    ".": "changes the shell",
    "ollama": "another program",
    "llama-cli": "another program",
    "llama-server": "another program",
    "vllm": "another program",
    "curl": "needs a server",
    "open": "opens a window",
    "bash scripts/": "slow; scripts/test.sh runs these tests",
    "python scripts/": "slow, and not part of the package",
    "python examples/": "tests/project/test_examples.py runs it",
    "jupyter": "opens a window",
    "nalora evaluate --tasks": "needs the network; tests/evaluate/test_tasks.py runs tasks",
}
SHELL = ("mkdir", "ls", "cat", "head", "echo", "printf", "cp")  # run by bash unchanged
RUNS = ("ADAPTERS", "RUN", "RUN_A", "RUN_B", "A", "B")  # placeholders for output directories of nalora lora
HUB_NAME = re.compile(r"[A-Za-z][\w.-]*/[\w.-]+")
# Flags of other programs in the pages.
FOREIGN = {
    "--check": "our scripts",
    "--dtype": "mlx_lm.convert",
    "--enable-lora": "vllm",
    "--hostfile": "mlx.launch",
    "--lora": "llama-cli",
    "--lora-modules": "vllm",
    "--max-lora-rank": "vllm",
    "--mlx-path": "mlx_lm.convert",
    "--model-only": "scripts/demo.sh",
    "--prepare": "scripts/digits.sh",
    "--hf-path": "mlx_lm.convert",
    "--delta": "mlx-lm-lora",
    "--dpo-cpo-loss-type": "mlx-lm-lora",
    "--fuse": "mlx-lm-lora",
    "--gradient-accumulation-steps": "mlx-lm-lora",
    "--load-in-4bits": "mlx-lm-lora",
    "--reference-model-path": "mlx-lm-lora",
    "--reward-scaling": "mlx-lm-lora",
    "--train-type": "mlx-lm-lora",
}


# --- commands -----------------------------------------------------------------------------------------------


def bash_blocks(page):
    """Return the content of a page's bash blocks."""
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.S | re.M)


def lines(page):
    """Return the command lines of a page's bash blocks, in order."""
    joined = [line for block in bash_blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in joined if shlex.split(line, comments=True)]


def why_not_run(line):
    """Return why no test runs a line, or None if it is run."""
    matches = [start for start in NOT_RUN if line == start or line.startswith((f"{start} ", f"{start}/"))]
    matches += [start for start in NOT_RUN if start.endswith("/") and line.startswith(start)]
    return NOT_RUN[max(matches, key=len)] if matches else None


class Reader:
    """Runs the lines of a page in the current directory."""

    iterations = 3  # of the last training run

    def run(self, line):
        """Run a line. Raise AssertionError if it is unknown or fails."""
        before, bar, line = line.rpartition(" | ") if " | nalora" in line else ("", "", line)
        stdin = self.shell(before) if bar else "hello\n"
        words, target = shlex.split(line, comments=True), None
        if ">" in words:
            index = words.index(">")
            words, target = words[:index], words[index + 1]
        environment = {}
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if words[0] == "mlx.launch":  # test_distributed.py tests several workers
            words = words[next(i for i, word in enumerate(words) if word in ("nalora", "python")) :]
        output = io.StringIO()
        with mock.patch.dict(os.environ, environment), mock.patch.object(sys, "stdin", io.StringIO(stdin)):
            if words[0] == "nalora" or (words[:2] == ["python", "-m"] and words[2].startswith("nalora_mlx.")):
                words = words[1:] if words[0] == "nalora" else [words[2].split(".")[1], *words[3:]]
                with redirect_stdout(output):
                    status = self.nalora(words)
            elif words[0].startswith("mlx_lm."):
                argv = [sys.executable, "-m", words[0], *self.with_tiny_model(words[1:])]
                done = subprocess.run(argv, text=True, input=stdin, stdout=subprocess.PIPE)
                status = done.returncode
            elif words[0] in SHELL:
                status = 0 if self.shell(line) is not None else 1
            else:
                raise AssertionError(f"neither run nor listed in NOT_RUN: {line}")
        expected = 130 if words[0] == "serve" else 0  # serve only ends on Ctrl-C
        assert status == expected, f"{line}: exit status {status}\n{output.getvalue()[-2000:]}"
        if target is not None:
            path = Path(re.sub(r"\$\{?\w+(\[\d+\])?\}?", ".", target)).expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(output.getvalue())

    def nalora(self, words):
        """Run a nalora command in this process; return its exit status."""
        words = [words[0], *self.with_tiny_model(words[1:])]
        if words[0] == "lora":
            words = self.shortened(words)
        limit = mx.set_memory_limit(1 << 40)
        mx.set_memory_limit(limit)
        try:
            if words[0] == "serve":
                importlib.import_module("mlx_lm.server")
                with mock.patch("mlx_lm.server.run"):
                    return main(words)
            return main(words)
        except SystemExit as end:
            return end.code
        finally:
            mx.set_memory_limit(limit)  # --memory-budget sets it for the whole process

    def with_tiny_model(self, words):
        """Replace names on the Hub by the tiny model and its data."""
        replacements = {"--model": "MODEL", "--data": "DATA", "--hf-path": "MODEL"}
        for index, (flag, value) in enumerate(itertools.pairwise(words), 1):
            if flag in replacements and HUB_NAME.fullmatch(value) and not Path(value).exists():
                words = [*words[:index], replacements[flag], *words[index + 1 :]]
        return words

    def shortened(self, words):
        """Limit a training run to a few iterations; add the tiny model and its data where they are missing."""
        short = []
        for word in words:
            if short and short[-1] in ("--iters", "--epochs"):
                short.pop()
            else:
                short.append(word)
        resumed = "--resume" in short and "--train" not in short  # with the run's own settings
        if "--model" not in short and not resumed:
            short += ["--model", "MODEL"]
        if not {"--data", "--config", "-c"} & set(short) and not resumed:
            short += ["--data", "DATA"]
        Reader.iterations += 1  # a resumed run continues
        return [*short, "--iters", str(Reader.iterations)]

    def shell(self, line):
        """Run a line in bash; return its output."""
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return the directory of a random llama that GGUF supports, with a chat template."""
    model, config = gguf_models.build("llama", num_hidden_layers=2)
    directory = gguf_models.save(tmp_path_factory.mktemp("docs") / "tiny", model, config)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    return directory


@pytest.fixture(scope="session")
def finished_run(tiny_model, data_directory, tmp_path_factory):
    """Return the output directory of a finished training run."""
    output = tmp_path_factory.mktemp("run") / "adapters"
    paths = ["--model", tiny_model, "--data", data_directory, "--adapter-path", output]
    flags = ["--iters", "4", "--steps-per-report", "2", "--num-layers", "-1", "--mask-prompt"]
    assert main(["lora", "--train", *map(str, paths), *flags]) == 0
    return output


@pytest.fixture
def working_directory(tiny_model, data_directory, finished_run, tmp_path, monkeypatch):
    """Change to a directory with all placeholders."""
    for name, target in {"MODEL": tiny_model, "DATA": data_directory, "examples": ROOT / "examples"}.items():
        (tmp_path / name).symlink_to(target)
    for name in RUNS:
        shutil.copytree(finished_run, tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def use_images():
    """Replace the model and the data in the current directory by ones with images, and add a photo."""
    from tests.vision.tiny_models import picture, save_model

    for name in ("MODEL", "DATA"):
        Path(name).unlink()
    for name in RUNS:
        shutil.rmtree(name)
    save_model("smolvlm", Path("MODEL"))
    Path("DATA").mkdir()
    picture(32, 32).save("photo.jpg")
    picture(32, 32).save("DATA/photo.png")
    row = {"prompt": "What is this?", "completion": "A photo.", "image": "photo.png"}
    Path("DATA/train.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    Path("DATA/valid.jsonl").write_text(f"{json.dumps(row)}\n")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page.stem in SLOW_PAGES else page for page in PAGES],
    ids=lambda page: page.stem,
)
@pytest.mark.usefixtures("working_directory")
def test_every_command_of_a_page_runs(page):
    if page.stem == "vision":
        pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[vlm]')")
        use_images()
    reader = Reader()
    for line in lines(page):
        if "nalora" in line and why_not_run(line) is None:
            for package in ("gguf", "xllamacpp", "matplotlib", "plotly"):
                pytest.importorskip(package, reason=f"the extras are not installed ({package})")
        if why_not_run(line) is None:
            reader.run(line)


@pytest.mark.parametrize(
    "line",
    [
        "frobnicate MODEL",
        "nalora lora --train --no-such-flag",
        "nalora lora --train --iters 5 --batch-size 0",
        "nalora fuse --model MODEL --adapter-path nowhere",
        "nalora nothing",
        "mkdir /proc/nothing",
        "echo hello | nalora chat --model NOWHERE",
    ],
)
@pytest.mark.usefixtures("working_directory")
def test_a_wrong_line_is_found(line):
    assert why_not_run(line) is None
    with pytest.raises(AssertionError):
        Reader().run(line)


def test_the_commands_of_the_readme_are_found():
    found = [line for line in lines(ROOT / "README.md") if why_not_run(line) is None]
    assert {"lora", "fuse"} <= {line.split()[1] for line in found if line.startswith("nalora ")}


# --- flags, links, generated pages --------------------------------------------------------------------------


def known_flags():
    """Yield the flags of all nalora commands."""
    for name in COMMANDS:
        parser = command(name).build_parser(name)
        add_common(parser)
        yield from (flag for action in parser._actions for flag in action.option_strings)


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_of_a_page_exists(page):
    """In bash blocks and in inline code. Flags of scripts and of pytest are looked up in their source."""
    sources = [*(ROOT / "scripts").iterdir(), ROOT / "tests" / "conftest.py"]
    scripts = "".join(path.read_text() for path in sources if path.is_file())
    flags = set()
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for code in [*bash_blocks(page), *re.findall(r"`[^`]+`", prose)]:
        flags.update(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code))
    known = set(known_flags()) | {"--help", "--version"} | set(FOREIGN)
    unknown = {flag for flag in flags - known if f'"{flag}"' not in scripts}
    assert not unknown


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_has_a_target(page):
    text = page.read_text()
    for target in re.findall(r'<img src="([^"]*)"', text):
        assert (page.parent / target).is_file(), target
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", text):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(), re.M)
            assert anchor in {
                "#" + re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
                for heading in headings
            }, anchor
    for script in re.findall(r"(?:bash|python) ((?:scripts|examples)/\S+\.(?:sh|py))", text):
        assert (ROOT / script).exists(), script
    for path in re.findall(r"`((?:nalora_mlx|tests|scripts|examples)/[\w/]+(?:\.\w+)?)`", text):
        assert (ROOT / path).exists(), path


def test_every_page_is_linked_from_another():
    text = {page: page.read_text() for page in PAGES}
    for page in PAGES[1:]:
        others = [other for other in PAGES if other != page]
        assert any(f"{page.name})" in text[other] or f"{page.name}#" in text[other] for other in others), page


@pytest.mark.parametrize(
    "script",
    [pytest.param(name, marks=pytest.mark.slow) if name == "mac_recipes" else name for name in GENERATED],
)
def test_generated_pages_are_up_to_date(script, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    assert not end.value.code


def keys_of_events():
    """Return the keys that docs/api.md names, by callback, or by event and split."""
    section = (
        (ROOT / "docs" / "api.md").read_text().partition("### Events and callbacks")[2].partition("\n### ")[0]
    )
    rows = re.findall(r"^\| `(\w+)`(?:, of `split` (\w+))? \|.*\| (.*) \|$", section, re.M)
    return {(name, split): set(re.findall(r"`(\w+)`", keys)) for name, split, keys in rows}


def test_the_keys_of_events_are_those_that_are_sent(model_directory, data_directory, tmp_path):
    sent, events = {}, []
    rows = [json.loads(line) for line in (data_directory / "train.jsonl").read_text().splitlines()]
    settings = {"batch_size": 2, "iters": 4, "steps_per_report": 2, "num_layers": 2}
    callbacks = {
        name: lambda info, name=name: sent.setdefault((name, ""), set(info))
        for name in ("on_report", "on_validation", "on_save")
    }
    result = nalora_mlx.finetune(
        model_directory,
        {"train": rows, "valid": rows},
        tmp_path / "a",
        progress=False,
        **callbacks,
        **settings,
    )
    del settings["num_layers"]
    nalora_mlx.train(
        result.model,
        rows,
        rows[:2],
        nalora_mlx.TrainingConfig(**settings),
        output=tmp_path / "b",
        tokenizer=result.tokenizer,
        listeners=[events.append],
    )
    nalora_mlx.train(
        result.model,
        [{"prompt": "what is red ?", "chosen": "a color .", "rejected": "blue ."}],
        config=nalora_mlx.TrainingConfig(train_mode="dpo", iters=1),
        tokenizer=result.tokenizer,
        listeners=[lambda event: events.append(event) if event["event"] == "reference" else None],
    )
    for event in events:
        sent.setdefault((event["event"], event.get("split", "")), set(event) - {"event"})
    sent.setdefault(("notice", ""), {"text"})  # nothing may have been worth one
    assert sent == keys_of_events()


def test_the_readme_is_short():
    words = (ROOT / "README.md").read_text().split()
    assert len(words) <= 1000, f"README.md has {len(words)} words: move something to docs/"


def test_python_blocks_compile():
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M):
            compile(block, str(page), "exec")
