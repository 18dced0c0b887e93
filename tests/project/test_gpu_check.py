"""scripts/gpu_check.py: sections in processes of their own, and what it makes of their results."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_check  # noqa: E402
from gpu_check import Section  # noqa: E402

WORKER = """
import os, sys, time
print('["first", {"error": null, "seconds": 1.5}]', flush=True)
what = sys.argv[sys.argv.index("--worker") + 1]
if what == "fail":
    sys.exit("it broke")
if what == "hang":
    time.sleep(60)
open(os.path.join(os.environ["MLX_PTX_CACHE_DIR"], what), "w").close()
print("a line of a library")
print('["second", {"error": "off by 1", "seconds": 2}]')
"""


@pytest.fixture
def sections(tmp_path, monkeypatch):
    """Return a section that ends, one that fails and one that hangs, after they ran at the same time."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "worker.py"))
    group = []
    for name in ("end", "fail", "hang"):
        (tmp_path / f"cache of {name}").mkdir()
        environment = {gpu_check.CACHE: str(tmp_path / f"cache of {name}")}
        group.append(Section(name, [name], 3 if name == "hang" else 30, environment))
    gpu_check.run_together(group, argparse.Namespace(device="cpu", quick=True), 60)
    return group


def test_a_section_that_fails_or_hangs_keeps_what_it_found(sections, tmp_path):
    end, fail, hang = sections
    assert [section.status for section in sections] == ["ok", "failed", "too slow"]
    assert list(end.found) == ["first", "second"]
    assert list(fail.found) == list(hang.found) == ["first"]
    assert fail.errors.strip() == "it broke"
    assert hang.seconds == pytest.approx(3, abs=2.5)
    assert gpu_check.wrong(end) == ["second"]
    assert "WRONG  second" in gpu_check.report(end)
    assert "it broke" in gpu_check.report(fail)
    gpu_check.merge_caches(sections, tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["end"]


def test_nothing_starts_once_the_time_is_up():
    section = Section("late", ["end"], 30)
    gpu_check.run_together([section], argparse.Namespace(device="cpu", quick=True), 5)
    assert section.status == "not run"


def test_it_measures_on_a_cpu(tmp_path):
    command = [sys.executable, SCRIPTS / "gpu_check.py", "--quick", "--device", "cpu"]
    output = tmp_path / "check.json"
    done = subprocess.run(
        [*command, "--output", output, "--sections", "correctness", "speed"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    correctness, speed = (one["results"] for one in json.loads(output.read_text())["sections"].values())
    assert all(result["ok"] for result in correctness.values())
    assert correctness["na-lora, float32"]["gradient_error"] == 0  # the same device twice
    assert correctness["na-lora, bfloat16"]["gradient_error"] > 1e-3  # a real difference is seen
    for kind, tokens in {"masked prompts": 12, "identical batches": 48}.items():
        assert speed[kind]["supervised_tokens"] == tokens
        losses = speed[f"{kind}: first iteration"]["loss"]
        # Both start from the same weights and read the same batch; by the second kind, their adapters have moved.
        assert losses["na-lora"] == pytest.approx(losses["mlx_lm.lora"], rel=1e-5 if tokens == 12 else 1e-2)
