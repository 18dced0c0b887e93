"""The commands that install extras: true for the way in which the package was installed."""

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from nalora_mlx.core import optional_dependencies
from nalora_mlx.core.optional_dependencies import install_command, install_packages

GIT = {"url": "https://example.org/n.git", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}}


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Return a function that pretends an installation, in an active virtual environment at tmp_path/env."""
    environment = tmp_path / "env"
    (environment / "bin").mkdir(parents=True)
    pip = environment / "bin" / "pip"
    pip.write_text("#!/bin/sh\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "prefix", str(environment))
    monkeypatch.setattr(sys, "executable", str(environment / "bin" / "python"))
    monkeypatch.setattr(optional_dependencies.sysconfig, "get_path", lambda name: str(environment / "bin"))
    monkeypatch.setenv("PATH", str(environment / "bin"))
    monkeypatch.setenv("VIRTUAL_ENV", str(environment))

    def pretend(source, has_pip=True):
        text = None if source is None else json.dumps(source)
        found = SimpleNamespace(
            read_text=lambda name: text if name == "direct_url.json" else None,
            requires=["gguf>=0.19; extra == 'export'", "xllamacpp>=2026.10; extra == 'export'"],
        )
        metadata = optional_dependencies.importlib.metadata
        monkeypatch.setattr(metadata, "distribution", lambda name: found)
        monkeypatch.setattr(optional_dependencies, "is_installed", lambda name: name == "pip" and has_pip)
        return environment

    return pretend


def words(command):
    return shlex.split(command)


def test_from_an_index_or_a_wheel(installed):
    installed(None)
    assert words(install_command("report", "data")) == ["pip", "install", "nalora-mlx[report,data]"]
    installed({"url": "file:///tmp/n.whl", "archive_info": {}})
    assert words(install_command("report")) == ["pip", "install", "nalora-mlx[report]"]
    assert words(install_packages("wandb")) == ["pip", "install", "wandb"]


@pytest.mark.parametrize("editable", [True, False])
def test_from_a_directory(installed, editable, tmp_path, monkeypatch):
    clone = tmp_path / "my clone"
    clone.mkdir()
    installed({"url": clone.as_uri(), "dir_info": {"editable": True} if editable else {}})
    flags = ["-e"] if editable else []
    for here, place in ((clone, "."), (tmp_path, "./my clone"), (tmp_path / "env", str(clone))):
        monkeypatch.chdir(here)
        assert words(install_command("export")) == ["pip", "install", *flags, f"{place}[export]"]
        path = words(install_command("export"))[-1].removesuffix("[export]")
        assert Path(path).resolve() == clone.resolve()


def test_from_git(installed):
    for more, reference, subdirectory in (
        ({}, "", ""),
        ({"vcs_info": GIT["vcs_info"] | {"requested_revision": "v1"}}, "@v1", ""),
        ({"subdirectory": "python"}, "", "#subdirectory=python"),
    ):
        installed(GIT | more)
        *start, wanted = words(install_command("report", "export"))
        assert start == ["pip", "install"]
        requirement = Requirement(wanted)
        assert (requirement.name, requirement.extras) == ("nalora-mlx", {"report", "export"})
        assert requirement.url == f"git+https://example.org/n.git{reference}{subdirectory}"


def test_environments_without_pip_and_inactive_ones(installed, monkeypatch, tmp_path):
    environment = installed(None, has_pip=False)
    assert words(install_command("data")) == ["uv", "pip", "install", "nalora-mlx[data]"]
    monkeypatch.delenv("VIRTUAL_ENV")
    monkeypatch.chdir(tmp_path / "env" / "bin")
    assert words(install_command("data")) == [
        "uv",
        "pip",
        "install",
        "--python",
        "./python",
        "nalora-mlx[data]",
    ]
    installed(None)
    monkeypatch.setenv("PATH", "/nowhere")  # pip on the path, if any, is that of another environment
    assert words(install_command("data")) == ["./python", "-m", "pip", "install", "nalora-mlx[data]"]
    monkeypatch.chdir(tmp_path)
    assert words(install_command("data"))[0] == "./env/bin/python"
    monkeypatch.chdir(Path(__file__).parent)
    assert words(install_command("data"))[0] == str(environment / "bin" / "python")


def test_tools_of_uv_keep_their_extras_and_packages(installed):
    environment = installed({"url": "file:///src/n", "dir_info": {"editable": True}}, has_pip=False)
    (environment / "uv-receipt.toml").write_text(
        '[tool]\nrequirements = [{ name = "nalora-mlx", extras = ["cpu", "export"], editable = "/src/n" }, '
        '{ name = "wandb" }]\n'
    )
    start = ["uv", "tool", "install", "-e"]
    assert words(install_command("report", "cpu")) == [*start, "/src/n[cpu,export,report]", "--with", "wandb"]
    assert words(install_packages("swanlab")) == [
        *(*start, "/src/n[cpu,export]", "--with", "wandb", "--with", "swanlab")
    ]


def test_pipx_injects_packages(installed):
    environment = installed(GIT)
    (environment / "pipx_metadata.json").write_text("{}")
    assert words(install_command("export")) == ["pipx", "inject", "env", "gguf", "xllamacpp"]
    assert words(install_packages("wandb")) == ["pipx", "inject", "env", "wandb"]


def test_a_source_tree_is_installed_in_place(installed, monkeypatch):
    installed(None)

    def missing(name):
        raise optional_dependencies.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(optional_dependencies.importlib.metadata, "distribution", missing)
    monkeypatch.chdir(Path(__file__).parents[2])
    assert words(install_command("report")) == ["pip", "install", "-e", ".[report]"]


def test_extras_of_the_project():
    """`all` has what the messages offer, but for what is heavy; README's first export needs only `export`."""
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = {
        name: {Requirement(line).name for line in lines}
        for name, lines in declared["optional-dependencies"].items()
    }
    (everything,) = declared["optional-dependencies"]["all"]
    assert Requirement(everything).extras == set(optional_dependencies.EXTRAS) - {"vlm", "notebook", "eval"}
    assert extras["export"] == {"gguf", "xllamacpp"}
    assert Requirement(*declared["optional-dependencies"]["kquants"]).extras == {"export"}


def test_setuptools_works_after_a_hint():
    """Looking for pip as a module would make setuptools use the distutils of Python, and fail."""
    pytest.importorskip("setuptools")
    program = (
        "from nalora_mlx.core.optional_dependencies import install_command as i; i('data'); import setuptools"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
