"""scripts/mac_check.sh: it writes one file, whatever happens, without names and paths of the machine."""

import getpass
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import mac_check  # noqa: E402
from section_runner import Section  # noqa: E402


def run(output, *flags, **environment):
    """Run the script with tiny sizes; return its exit status, its output, and what it wrote."""
    command = [sys.executable, ROOT / "scripts/mac_check.py", "--output", output, "--quick", *flags]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **environment}
    )
    return done.returncode, done.stdout + done.stderr, output.read_text()


def assert_is_anonymous(text):
    for path in (str(ROOT), str(Path.home()), sys.prefix):
        assert path not in text
    for name in (socket.gethostname(), getpass.getuser()):
        if name not in ("root", "localhost"):
            assert name not in text


def test_sections_are_written_and_summarized(tmp_path):
    status, output, text = run(tmp_path / "check.json", "--sections", "machine", "forty")
    assert status == 0, output
    assert "3 of 3 sections passed" in output
    document = json.loads(text)
    assert document["format"] == 1
    assert list(document["sections"]) == ["machine", "machine with exact products", "forty iterations"]
    results = {name: section["results"] for name, section in document["sections"].items()}
    assert {"macos", "versions", "device_info", "memory_bytes"} <= results["machine"].keys()
    assert results["forty iterations"]["float32"]["ok"]
    assert len(results["forty iterations"]["float32, kernels"]["losses"]) == 4
    assert_is_anonymous(text)


def test_a_failing_section_is_recorded_and_the_others_run(tmp_path):
    status, output, text = run(
        tmp_path / "check.json", "--sections", "machine", "accuracy", NALORA_KERNEL="nonsense"
    )
    assert status == 1
    sections = json.loads(text)["sections"]
    assert [section["status"] for section in sections.values()] == ["failed"] * 3
    assert "NALORA_KERNEL=nonsense: choose from" in sections["accuracy"]["errors"]
    assert "versions" in sections["machine"]["results"]  # what it found before
    assert "NALORA_KERNEL=nonsense: choose from" in output
    assert_is_anonymous(text)


@pytest.mark.slow
def test_all_sections_run(tmp_path):
    status, output, text = run(tmp_path / "check.json")
    assert status == 0, output
    sections = json.loads(text)["sections"]
    assert len(sections) == len(mac_check.sections(quick()))
    assert_is_anonymous(text)


def quick():
    return mac_check.argparse.Namespace(quick=True, sections=None)


def test_names_and_paths_are_replaced(monkeypatch):
    monkeypatch.setattr(mac_check, "_names", lambda: {"Tester-Mac", "tester"})
    monkeypatch.setattr(
        mac_check, "_paths", lambda: [("/somewhere/tester/work", "PROJECT"), ("/somewhere/tester", "HOME")]
    )
    value = {
        "a": ["/somewhere/tester/work/x.py", "/somewhere/tester/.cache", 3, None],
        "tester-mac.local": "contesters of Tester",
    }
    assert mac_check.anonymous(value) == {
        "a": ["PROJECT/x.py", "HOME/.cache", 3, None],
        "NAME.local": "contesters of NAME",
    }


def test_the_limits_and_what_is_said_of_a_section():
    sections = mac_check.sections(quick())
    assert sections[0].name == "machine"
    assert all(0 < section.limit <= 300 for section in sections)
    assert mac_check.BUDGET <= 15 * 60
    wrong = Section("losses", [], 1, found={"x": {"ok": False, "summary": "no"}}, status="ok", seconds=2)
    assert mac_check.report(wrong).startswith("WRONG        2 s  losses\n           WRONG: x: ")


@pytest.mark.skipif(platform.system() == "Darwin", reason="runs there")
def test_elsewhere_it_needs_quick(tmp_path):
    command = [sys.executable, ROOT / "scripts/mac_check.py", "--output", tmp_path / "check.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "not a Mac" in done.stderr
    assert not (tmp_path / "check.json").exists()


def test_the_shell_script_is_valid():
    subprocess.run(["bash", "-n", ROOT / "scripts/mac_check.sh"], check=True)
