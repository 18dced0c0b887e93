"""scripts/gpu_check.py: sections in processes of their own, and what it makes of their results."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_check  # noqa: E402
from section_runner import Section, run_sections  # noqa: E402

WORKER = """
import os, subprocess, sys, time
print('["first", {"error": null, "seconds": 1.5}]', flush=True)
what = sys.argv[1]
if what == "fail":
    sys.exit("it broke")
if what == "hang":  # a program that it started keeps its output open
    subprocess.run(["sleep", "60"])
open(os.path.join(os.environ["MLX_PTX_CACHE_DIR"], what), "w").close()
print("a line of a library")
print('["second", {"error": "off by 1", "seconds": 2}]')
"""


@pytest.fixture
def sections(tmp_path):
    """Return a section that ends, one that fails and one that hangs, after they ran at the same time."""
    (tmp_path / "worker.py").write_text(WORKER)
    group = []
    for name in ("end", "fail", "hang"):
        (tmp_path / f"cache of {name}").mkdir()
        environment = {gpu_check.CACHE: str(tmp_path / f"cache of {name}")}
        command = [sys.executable, str(tmp_path / "worker.py"), name]
        group.append(Section(name, command, 3 if name == "hang" else 30, environment))
    run_sections(group, 60, at_once=3)
    return group


def test_a_section_that_fails_or_hangs_keeps_what_it_found(sections, tmp_path):
    end, fail, hang = sections
    assert [section.status for section in sections] == ["ok", "failed", "too slow"]
    assert list(end.found) == ["first", "second"]
    assert list(fail.found) == list(hang.found) == ["first"]
    assert fail.errors.strip() == "it broke"
    assert hang.seconds == pytest.approx(3, abs=2.5)
    assert end.wrong == ["second"]
    assert not end.passed
    assert "WRONG  second" in gpu_check.report(end)
    assert "it broke" in gpu_check.report(fail)
    gpu_check.merge_caches(sections, tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["end"]


def test_sections_run_in_order_and_no_more_at_once_than_allowed(tmp_path):
    log = tmp_path / "log"
    program = f"import sys, time; open({str(log)!r}, 'a').write(sys.argv[1]); time.sleep(0.4)"
    program += f"; open({str(log)!r}, 'a').write(sys.argv[1].upper())"
    order: list[str] = []
    sections = [Section(name, [sys.executable, "-c", program, name], 30) for name in "abcd"]
    run_sections(sections, 60, 2, lambda section: order.append(section.name))
    assert sorted(order) == list("abcd")
    running, most = set(), 0
    for letter in log.read_text():
        running = running - {letter.lower()} if letter.isupper() else running | {letter}
        most = max(most, len(running))
    assert most == 2
    assert set(log.read_text()[:2]) == {"a", "b"}


def test_nothing_starts_once_the_time_is_up():
    late = Section("late", ["true"], 30)
    seen: list[Section] = []
    run_sections([late], 4, 1, seen.append)
    assert late.status == "not run"
    assert seen == [late]


def test_the_programs_that_a_section_started_end_with_it(tmp_path):
    program = "import subprocess; p = subprocess.Popen(['sleep', '60']); print([str(p.pid), 1].__repr__()"
    program += ".replace(\"'\", '\"'), flush=True); p.wait()"
    section = Section("hang", [sys.executable, "-c", program], 2)
    run_sections([section], 60)
    (pid,) = map(int, section.found)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if (Path("/proc") / str(pid)).exists() and "Z" in (Path("/proc") / str(pid) / "stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def test_the_most_important_sections_come_first_and_six_run_at_once():
    args = argparse.Namespace(quick=False, device="gpu", sections=None)
    together, alone = gpu_check.sections(args, Path("/nowhere/compiled"), Path("/nowhere"))
    names = [section.name for section in together]
    assert names[0] == "machine"
    assert names.index("correctness") < names.index("recurrences")
    assert gpu_check.AT_ONCE <= 6
    assert alone[0].name.startswith("speed qwen3-0.6b")
    caches = [section.environment[gpu_check.CACHE] for section in together[1:]]
    assert len(set(caches)) == len(caches)
    assert {section.environment[gpu_check.CACHE] for section in alone} == {"/nowhere/compiled"}


def test_it_measures_on_a_cpu(tmp_path):
    command = [sys.executable, SCRIPTS / "gpu_check.py", "--quick", "--device", "cpu"]
    output = tmp_path / "check.json"
    chosen = ["correctness", "primitives", "accuracy", "speed"]
    done = subprocess.run(
        [*command, "--output", output, "--sections", *chosen], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: one["results"] for name, one in json.loads(output.read_text())["sections"].items()}
    correctness, primitives = found["correctness"], found["primitives"]
    assert all(result["ok"] for result in (correctness | primitives | found["accuracy"]).values())
    assert correctness["rank 8, kernels"]["change_error"] == 0  # the same device twice
    assert correctness["rank 8, bfloat16"]["change_error"] > 1e-2  # a real difference is seen
    assert len(primitives) > 40
    assert primitives["batched product"]["float32_error"] > 1e-9  # the truth is more precise than float32
    (speed,) = (results for name, results in found.items() if name.startswith("speed"))
    for kind, tokens in {"masked prompts": 12, "identical batches": 48}.items():
        assert speed[kind]["supervised_tokens"] == tokens
        losses = speed[f"{kind}: first iteration"]["loss"]
        # Both start from the same weights and read the same batch; by the second kind, their adapters have moved.
        assert losses["na-lora"] == pytest.approx(losses["mlx_lm.lora"], rel=1e-5 if tokens == 12 else 1e-2)
