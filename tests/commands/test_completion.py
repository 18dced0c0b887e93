"""nalora completion: the words that bash completes."""

import os
import shutil
import subprocess
import sys

import pytest

from nalora_mlx.__main__ import COMMANDS, main
from nalora_mlx.cli import command

BASH = shutil.which("bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-m", "nalora_mlx", "completion", "bash"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("completion") / "nalora.bash"
    path.write_text(done.stdout)
    return path


def completed(script, *words, directory="."):
    """Return bash's completions of the last word, from the function that the script registers for nalora."""
    ask = (
        'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}\n'
        "function=$(complete -p nalora | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n"
        '"$function" nalora "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"\n'
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        [BASH, "--norc", "-c", ask, str(script), "nalora", *words],
        capture_output=True,
        text=True,
        cwd=directory,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
def test_bash_completes_commands_flags_choices_and_paths(script, tmp_path):
    assert completed(script, "ch") == {"chat"}
    assert completed(script, "") >= set(COMMANDS)
    assert completed(script, "lora", "--batch") == {"--batch-size"}
    assert completed(script, "chat", "--comp") == {"--compare"}
    assert completed(script, "lora", "--fine-tune-type", "d") == {"dora"}
    assert completed(script, "export", "gguf-") == {"gguf-lora"}
    (tmp_path / "trained").mkdir()
    assert completed(script, "chat", "--adapter-path", "tra", directory=tmp_path) == {"trained"}


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_bash_completes_every_flag_of_every_command(script, name):
    flags = {o for action in command(name).build_parser("x")._actions for o in action.option_strings}
    assert completed(script, name, "--") == {o for o in flags if o.startswith("--")} | {
        "--debug",
        "--version",
    }


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_for_other_shells(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    if path := shutil.which(shell):
        subprocess.run([path, "-n", "/dev/stdin"], input=script, text=True, check=True)


def test_an_unknown_shell_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["completion", "ksh"])
    assert stopped.value.code == 2
    assert "choose from" in capsys.readouterr().err
