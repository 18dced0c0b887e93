"""Environment variables that the commands set for GPU drivers and MLX."""

import os
import subprocess
import sys

import pytest

from nalora_mlx import __main__

AGX = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"


@pytest.mark.parametrize(
    ("platform", "given", "expected"),
    [
        ("darwin", {}, {AGX: "1"}),
        ("darwin", {AGX: "0"}, {AGX: "0"}),
        ("linux", {}, {"MLX_CUDA_GRAPH_CACHE_SIZE": "2048", "MLX_ENABLE_CACHE_THRASHING_CHECK": "0"}),
        (
            "linux",
            {"MLX_CUDA_GRAPH_CACHE_SIZE": "9"},
            {"MLX_CUDA_GRAPH_CACHE_SIZE": "9", "MLX_ENABLE_CACHE_THRASHING_CHECK": "0"},
        ),
        ("win32", {}, {}),
    ],
)
def test_defaults_never_override_the_user(platform, given, expected, monkeypatch, capsys):
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(sys, "platform", platform)
    assert __main__.main(["--version"]) == 0
    assert environment == expected


def test_only_commands_set_them_and_before_mlx_is_imported():
    code = "print('mlx' in sys.modules, os.environ.get(sys.argv[1]))"
    code = f"import os, sys; sys.platform = 'darwin'; import nalora_mlx, nalora_mlx.__main__; {code}"
    environment = {name: value for name, value in os.environ.items() if name != AGX}
    done = subprocess.run(
        [sys.executable, "-c", code, AGX], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "False None\n"
