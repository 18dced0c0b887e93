"""Help pages: short, complete with --help-all, and with examples that work."""

import argparse
import contextlib
import dataclasses
import io
import re
import shlex

import pytest

from nalora_mlx.__main__ import main, overview
from nalora_mlx.arguments import Parser, add_common
from nalora_mlx.cli import COMMAND_GROUPS, COMMANDS, command
from nalora_mlx.core.config import NALoRAConfig, NAParameters, RunConfig
from nalora_mlx.export.arguments import FORMATS

PAGES = [*COMMANDS, *(f"export {name}" for name in FORMATS)]
SCREEN = 45  # lines at 100 columns
METAVARS = {
    *(
        "MODEL",
        "DATA",
        "DIR",
        "FILE",
        "PATH",
        "RUN",
        "FORMAT",
        "TYPE",
        "NAME",
        "TEXT",
        "PATTERN",
        "NATS",
        "NAMES",
        "KEY",
        "TOKEN",
        "SHELL",
    ),
    *("N", "P", "T", "BITS", "RATE", "FRACTION", "SIZE", "SECONDS", "PORT", "ADDRESS", "LEVEL", "JSON"),
    *("OWNER/NAME", "PUBLISHER/NAME", "[NAME=]DIR", "URL,...", "True|False"),
}


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def parser_of(page):
    """Return the parser that prints a page, and the command's parser."""
    name, *first = page.split()
    parser = command(name).build_parser(f"nalora {name}")
    add_common(parser)
    return parser.pages[first[0]] if first else parser, parser


def printed(*argv):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        main([*argv])
    assert end.value.code == 0
    return output.getvalue()


def flags_in(text):
    """Return the flags that a page explains, at the start of a line."""
    rows = re.findall(r"^  (-.*?)(?:  |$)", text.partition("\nexamples:")[0], re.M)
    return {
        flag.replace("[no-]", "") for row in rows for flag in re.findall(r"(?<!\S)--?[\w\[-][\w\]-]*", row)
    }


def test_the_first_page_lists_all_commands_with_examples():
    page = overview()
    assert len(page.splitlines()) <= 30
    assert [line.split()[0] for line in page.splitlines() if re.match(r"  [a-z]+  ", line)] == [*COMMANDS]
    assert all(f"\n{title}:\n" in page for title in COMMAND_GROUPS)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short_and_its_long_form_complete(page):
    parser, _ = parser_of(page)
    short, long = printed(*page.split(), "--help"), printed(*page.split(), "--help-all")
    assert len(short.splitlines()) <= SCREEN
    assert len(short.splitlines()[0]) <= 90
    assert short.startswith(f"usage: nalora {page} ")
    actions = [action for action in parser._actions if action.option_strings]
    switches = [action for action in actions if isinstance(action, argparse.BooleanOptionalAction)]
    off = {action.option_strings[1] for action in switches}  # --no-x, which stands for itself
    everything = {flag for action in actions for flag in action.option_strings} - off
    assert flags_in(long) == everything
    assert flags_in(short) < everything
    assert f"\n{parser.prog} --help-all lists all {len(actions)} flags.\n" in short
    assert ("--no-NAME" in long) == bool(switches)


@pytest.mark.parametrize("page", PAGES)
def test_examples_are_parsed_by_the_parser_of_the_command(page):
    parser, whole = parser_of(page)
    lines = [line.strip() for line in parser.examples.splitlines() if line.strip().startswith("nalora ")]
    assert len(lines) >= (3 if " " not in page else 1)
    for line in lines:
        words = shlex.split(re.split(r" [<>] ", line)[0])
        assert words[:2] == ["nalora", page.split()[0]]
        assert len(line) <= 102
        args = whole.parse_args(words[2:])
        if page.startswith("export "):
            assert args.format == page.split()[1]
    assert all(f"    {line}\n" in printed(*page.split(), "--help") for line in lines)


def test_examples_of_the_first_page_are_parsed():
    lines = [line.strip() for line in overview().splitlines() if line.startswith("  nalora ")]
    assert len(lines) == 3
    for line in lines:
        _, name, *flags = shlex.split(line)
        command(name).build_parser(name).parse_args(flags)


@pytest.mark.parametrize("page", PAGES)
def test_values_have_names_that_say_what_they_are(page):
    parser, _ = parser_of(page)
    for action in parser._actions:
        if action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
            assert action.metavar in METAVARS, (action.option_strings, action.metavar)


@pytest.mark.parametrize("page", PAGES)
def test_essentials_are_arguments(page):
    parser, _ = parser_of(page)
    assert set(parser.essentials or ()) <= {action.dest for action in parser._actions}


def test_the_long_page_of_lora_has_every_setting_in_a_group():
    parser, _ = parser_of("lora")
    settings = {f.name: f for c in (RunConfig, NALoRAConfig) for f in dataclasses.fields(c)}
    flags = {action.dest for action in parser._actions}
    assert flags >= {name for name, f in settings.items() if not f.metadata.get("yaml_only")}
    groups = {g.title: {a.dest for a in g._group_actions} for g in parser._action_groups}
    assert not groups["options"]
    (na,) = [title for title in groups if title.startswith("NA-LoRA")]
    assert groups[na] == set(NAParameters.__dataclass_fields__)


def test_each_export_format_shows_only_its_flags():
    flags = {name: flags_in(printed("export", name, "--help")) for name in FORMATS}
    assert {"--type", "--ollama", "--lmstudio", "--dry-run"} <= flags["gguf"]
    assert not {"--type", "--ollama", "--push-to-hub", "--from-peft"} & flags["gguf-lora"]
    assert {"--push-to-hub"} == flags["peft"] - flags["gguf-lora"]
    assert {"--push-to-hub", "--from-peft"} == flags["mlx"] - flags["gguf-lora"]
    assert flags_in(printed("export", "gguf", "--help-all")) > flags["gguf"]


def test_doctor_claims_no_default_that_it_does_not_use():
    page = printed("doctor", "--help-all")
    assert RunConfig.data not in page
    assert RunConfig.model not in page
    assert RunConfig.data in printed("lora", "--help")


def test_help_is_a_command_too(capsys):
    assert main(["help"]) == 0
    assert capsys.readouterr().out == overview() + "\n"
    assert printed("help", "fuse") == printed("fuse", "--help")


def test_a_switch_is_shown_once():
    page = printed("lora", "--help-all")
    assert re.search(r"^  --packing  ", page, re.M)
    assert re.search(r"^  --\[no-\]samples  .*", page, re.M)
    assert "(default: false)" not in page


def test_without_essentials_only_the_general_flags_are_hidden():
    parser = Parser(prog="x", description="Do it.")
    parser.add_argument("--a", metavar="N", help="a number")
    add_common(parser)
    assert flags_in(parser.format_help()) == {"--a"}
    assert flags_in(parser.format_help(True)) == {"--a", "-h", "--help", "--help-all", "--debug", "--version"}
