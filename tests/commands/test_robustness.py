"""Damaged and malicious files: every command gives one clear error line or the correct result.

Hypothesis mutates valid files: bytes are flipped, cut, doubled or inserted; in JSON trees, values are replaced, keys
renamed or removed, and numbers made huge or negative.
"""

import ast
import copy
import json
import math
import re
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as safetensors_load

import nalora_mlx
from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.files import adapter_weights, check_adapter, load_any_adapter
from nalora_mlx.core.config import RunConfig, TrainingConfig, load_run_config
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.parsing import coerce
from nalora_mlx.core.yaml_files import read_yaml
from nalora_mlx.data.checks import read_rows, tokenize
from nalora_mlx.models.loading import check_files, load_model
from nalora_mlx.runs.resume import STATE_FILE, read_state, restore
from tests.conftest import build_model, random_adapters
from tests.data.test_tokenization import CHAT, COMPLETION

PACKAGE = Path(nalora_mlx.__file__).parent
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def mutations(count):
    return settings(max_examples=count, deadline=None, suppress_health_check=FIXTURES, derandomize=True)


# --- mutations ----------------------------------------------------------------------------------------------

NUMBERS = (
    st.sampled_from([0, -1, 1, 2, 7, 2**31, 2**32, 2**63, 10**9, 10**30, -(2**40), 1e-30, 1e300])
    | st.integers()
    | st.floats()
)
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["", "../x", "/etc/passwd", "\x00", "model.layers.0", "lora", "ü" * 9]
)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def places(tree, path=()):
    """Yield the path of keys of every value in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated_tree(draw, tree):
    """Apply one to three changes to a JSON tree."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            return draw(ANYTHING)
        *way, last = draw(st.sampled_from(found))
        home = tree
        for key in way:
            home = home[key]
        what = draw(st.sampled_from(["replace", "replace", "number", "delete", "rename", "wrap", "double"]))
        if what == "replace":
            home[last] = draw(ANYTHING)
        elif what == "number":
            home[last] = draw(NUMBERS)
        elif what == "delete":
            del home[last]
        elif what == "wrap":
            home[last] = [home[last]]
        elif what == "double" and isinstance(home, list):
            home.append(copy.deepcopy(home[last]))
        elif isinstance(home, dict):
            home[draw(TEXTS)] = home.pop(last) if what == "rename" else copy.deepcopy(home[last])
    return tree


@st.composite
def mutated_bytes(draw, content):
    """Apply one to three changes to bytes."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        size = draw(st.integers(1, 40))
        what = draw(st.sampled_from(["flip", "flip", "delete", "insert", "cut", "double", "zero", "swap"]))
        if what == "flip" and content:
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        elif what == "delete":
            content = content[:at] + content[at + size :]
        elif what == "insert":
            content = content[:at] + draw(st.binary(max_size=20)) + content[at:]
        elif what == "cut":
            content = content[:at]
        elif what == "double":
            content = content[:at] + content[at : at + size] + content[at:]
        elif what == "zero":
            content = content[:at] + b"\0" * len(content[at : at + size]) + content[at + size :]
        elif what == "swap":
            content = content[at:] + content[:at]
    return content


def dumped(tree):
    return json.dumps(tree).encode()


def header_of(content):
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header, body, size=None):
    raw = header if isinstance(header, bytes) else dumped(header)
    return struct.pack("<Q", len(raw) if size is None else size) + raw + body


@st.composite
def mutated_safetensors(draw, content):
    """Change the header, the header length or the bytes of a safetensors file."""
    header, body = header_of(content)
    what = draw(st.sampled_from(["tree", "tree", "header", "length", "any", "body"]))
    if what == "tree":
        return with_header(draw(mutated_tree(header)), body)
    if what == "header":
        return with_header(draw(mutated_bytes(dumped(header))), body)
    if what == "length":
        return with_header(header, body, draw(st.integers(0, 2**64 - 1) | st.integers(0, 3000)))
    return draw(mutated_bytes(content)) if what == "any" else with_header(header, draw(mutated_bytes(body)))


def attempt(action, *words):
    """Return (result, None), or (None, error message), which must contain one of the words."""
    try:
        return action(), None
    except InputError as error:
        text = str(error)
    assert text.strip()
    assert len(text) < 3000
    assert any(word in text for word in words), text
    return None, text


def snapshot(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# --- data ---------------------------------------------------------------------------------------------------

ROWS = [
    COMPLETION,
    CHAT,
    {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "is red"}]},
]
LINES = st.sampled_from(ROWS).flatmap(
    lambda row: (
        mutated_tree(row).map(dumped) | mutated_bytes(dumped(row)).map(lambda b: b.replace(b"\n", b" "))
    )
)


def joined(content):
    """Return the text of a message's content, which can be a list of strings."""
    is_list = isinstance(content, list) and all(isinstance(part, str) for part in content)
    return "".join(content) if is_list else content


@mutations(200)
@given(line=LINES, mask=st.booleans())
def test_data_lines(line, mask, tmp_path, tokenizer):
    """A mutated line between two good ones is reported, or read correctly; the good ones are unaffected."""
    good = dumped(COMPLETION)
    (tmp_path / "train.jsonl").write_bytes(b"\n".join([good, line, good]))
    found = read_rows(RunConfig(data=str(tmp_path), mask_prompt=mask), ["train"])
    split = tokenize(found, tokenizer, 64)["train"]
    assert all("train.jsonl:2: " in problem for problem in found.problems + split.errors)
    by_source = {example.source.rpartition(":")[2]: example for example in split.sequences}
    assert set(by_source) >= {"1", "3"}
    assert by_source["1"].tokens.tolist() == by_source["3"].tokens.tolist()
    refused = bool(found.problems or split.errors)
    if "2" in by_source:
        assert not refused
        row = json.loads(line)
        assert isinstance(row, dict)
        row = {key.lower(): value for key, value in row.items()}  # capitals do not matter
        messages = row.get("messages")
        if {"prompt", "completion"} <= row.keys():
            pair = (("user", row["prompt"]), ("assistant", row["completion"]))
            messages = [{"role": role, "content": text} for role, text in pair]
        # A list of strings is read as one text, which the template would write as a list.
        messages = [{**m, "content": joined(m.get("content"))} for m in messages]
        while messages[-1]["role"] != "assistant":  # nothing after the last answer is trained
            del messages[-1]
        want = tokenizer.apply_chat_template(messages, tools=row.get("tools"), return_dict=False)[:64]
        assert by_source["2"].tokens.tolist() == list(want)
    elif not refused and line.strip():
        assert any("no supervised token" in notice for notice in split.notices)


# --- settings -----------------------------------------------------------------------------------------------

SETTINGS = {
    "train": True,
    "iters": 3,
    "batch_size": 2,
    "learning_rate": 1e-4,
    "optimizer": "adam",
    "optimizer_config": {"adam": {"eps": 1e-8}},
    "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["mlp.gate_proj"]},
    "na_parameters": {"mask": "soft", "beta": 0.9, "gamma": [0.5, 1.0, 1.0]},
    "fine_tune_type": "na-lora",
    "num_layers": 2,
    "seed": 1,
    "save_every": 2,
    "grad_clip": 1.0,
}


@mutations(200)
@given(
    content=mutated_tree(SETTINGS).map(lambda tree: yaml.safe_dump(tree).encode())
    | mutated_bytes(dumped(SETTINGS))
)
def test_config_files(content, tmp_path):
    """A mutated config gives an error that names the file or a setting, or every setting has its type."""
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    config, refused = attempt(lambda: load_run_config(path, {}), "c.yaml")
    if (
        refused
        or attempt(
            config.check,
            *RunConfig.__dataclass_fields__,
            "NA-LoRA",
            "settings",
            "lora_parameters",
            "nothing to do",
        )[1]
    ):
        return
    settings = {name: getattr(config, name) for name in RunConfig.__dataclass_fields__}
    assert coerce(settings, RunConfig, "again") == settings
    given = read_yaml(path)
    for name in ("iters", "batch_size", "seed", "optimizer"):
        if given.get(name) is not None:
            assert getattr(config, name) == (given[name].lower() if name == "optimizer" else given[name])
    assert math.isfinite(config.learning_rate)


# --- adapters -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A valid adapter of the tiny llama."""
    from nalora_mlx.adapters.files import adapter_config
    from nalora_mlx.core.config import NALoRAConfig

    model = build_model()
    adapt(model, NALoRAConfig(rank=2, scale=4.0, num_layers=2))
    random_adapters(model)
    directory = tmp_path_factory.mktemp("adapter")
    mx.save_safetensors(str(directory / "adapters.safetensors"), adapter_weights(model), {"format": "mlx"})
    (directory / "adapter_config.json").write_text(json.dumps(adapter_config(model)))
    return directory


@pytest.fixture
def broken(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "broken", dirs_exist_ok=True)
    return tmp_path / "broken"


@mutations(200)
@given(data=st.data())
def test_adapter_configs(data, adapter, broken):
    """A mutated config is refused, or loaded correctly with the weights of the file."""
    whole = json.loads((adapter / "adapter_config.json").read_text())
    content = data.draw(mutated_tree(whole).map(dumped) | mutated_bytes(dumped(whole)))
    (broken / "adapter_config.json").write_bytes(content)
    model = build_model()
    before = snapshot(broken)
    _, refused = attempt(lambda: load_any_adapter(model, broken), "adapter", "NA-LoRA")
    if not refused:
        says = json.loads(content)
        loaded = mx.load(str(adapter / "adapters.safetensors"))
        if says.get("fine_tune_type", "lora") == "lora":
            assert model.adapt_result.config.scale == says["lora_parameters"]["scale"]
            got = adapter_weights(model)
            assert got.keys() == loaded.keys()
            for name in got:
                assert mx.array_equal(got[name], loaded[name]).item()
    assert snapshot(broken) == before


@mutations(200)
@given(data=st.data())
def test_adapter_weights(data, adapter, broken):
    """Mutated weights are refused, or equal what another reader finds in the file."""
    whole = (adapter / "adapters.safetensors").read_bytes()
    content = data.draw(mutated_safetensors(whole))
    (broken / "adapters.safetensors").write_bytes(content)
    model = build_model()
    if attempt(lambda: load_any_adapter(model, broken), "adapters.safetensors", "adapter_config.json")[1]:
        return
    want = safetensors_load(content)
    got = adapter_weights(model)
    assert got.keys() == want.keys()
    for name in got:
        np.testing.assert_array_equal(np.array(got[name]), want[name].astype(np.float32))


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    from tests.runs.test_resume import start_run

    output = tmp_path_factory.mktemp("state") / "run"
    start_run(output, iters=2, save_every=2)
    return output / "checkpoints" / "step-0000002"


def state_of(directory):
    """Return an adapted model and the trees that a checkpoint restores."""
    import mlx.optimizers as optim

    from nalora_mlx.core.config import NALoRAConfig
    from nalora_mlx.training.step import TrainingStep
    from tests.conftest import llama_args

    model = build_model(args=llama_args(num_hidden_layers=2))
    config = NALoRAConfig(num_layers=-1, rank=4, scale=4.0, mask_warmup=3)
    adapt(model, config)
    step = TrainingStep(model, optim.Adam(1e-2), config)
    return model, step.state_tree()


@mutations(200)
@given(data=st.data())
def test_checkpoints(data, run_directory, tmp_path):
    """Any change of the content is refused, and the directory stays unchanged."""
    directory = tmp_path / "step"
    shutil.copytree(run_directory, directory, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(sorted(p.name for p in run_directory.iterdir())))
    whole = (run_directory / name).read_bytes()
    if name.endswith(".json"):
        content = data.draw(mutated_tree(json.loads(whole)).map(dumped) | mutated_bytes(whole))
    else:
        content = data.draw(mutated_safetensors(whole))
    (directory / name).write_bytes(content)
    before, key = snapshot(directory), mx.random.state[0].tolist()
    model, trees = state_of(directory)
    settings = TrainingConfig(iters=10)

    def resume():
        return restore(directory, read_state(directory).identity, settings, model, trees, 10)

    done, _ = attempt(resume, name, "--resume")
    mx.random.seed(key[0] << 32 | key[1])
    if done:
        if name.endswith(".json"):
            assert json.loads(content) == json.loads(whole)
        else:
            want = safetensors_load(whole)
            for array, values in safetensors_load(content).items():
                np.testing.assert_array_equal(values, want[array])
        assert done[0].iteration == 2
    assert snapshot(directory) == before


# --- models -------------------------------------------------------------------------------------------------


@mutations(200)
@given(data=st.data())
def test_model_files(data, model_directory, tmp_path):
    """A model with a mutated config, index or weights is refused in one line, or loaded."""
    directory = tmp_path / "model"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(model_directory, directory)
    name = data.draw(st.sampled_from(["config.json", "model.safetensors", "model.safetensors.index.json"]))
    if name == "config.json":
        whole = json.loads((model_directory / name).read_text())
        content = data.draw(mutated_tree(whole).map(dumped) | mutated_bytes(dumped(whole)))
    elif name == "model.safetensors":
        content = data.draw(mutated_safetensors((model_directory / name).read_bytes()))
    else:
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}}
        content = data.draw(mutated_tree(index).map(dumped))
    (directory / name).write_bytes(content)
    before = snapshot(directory)
    attempt(lambda: load_model(str(directory)), "--model", name)
    assert snapshot(directory) == before


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, the weights"),
        ("config.json", {"text_config": {"a": {"n_layers": 10**9}}}, "n_layers 1000000000, the weights"),
        ("config.json", {"hidden_size": 10**9}, "cannot be loaded"),
        ("config.json", {"model_file": "evil.py"}, "trust_remote_code"),
        ("config.json", {"model_type": "../../evil"}, "cannot be loaded"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../../secret.safetensors"}}, "same directory"),
        ("model.safetensors.index.json", {"weight_map": ["a"]}, "same directory"),
    ],
)
def test_malicious_models_are_refused(name, change, words, model_directory, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(model_directory, directory)
    (directory / "evil.py").write_text("raise SystemExit('untrusted code was run')")
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | change))
    with pytest.raises(InputError, match=words):
        load_model(str(directory))


def test_a_malicious_tokenizer_runs_no_code(model_directory, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(model_directory, directory)
    (directory / "evil.py").write_text("raise SystemExit('untrusted code was run')")
    path = directory / "tokenizer_config.json"
    change = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    attempt(lambda: load_model(str(directory)), "--model")


def test_a_malicious_adapter_allocates_no_memory(adapter, broken):
    content = json.loads((adapter / "adapter_config.json").read_text())
    content["lora_parameters"]["rank"] = 10**9
    (broken / "adapter_config.json").write_text(json.dumps(content))
    for look in (check_adapter, lambda directory: load_any_adapter(build_model(), directory)):
        with pytest.raises(InputError, match=r"rank is 1000000000, but the weights have \[2\]"):
            look(broken)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 10**8}, "rank is 100000000, but the weights have"),
        ({"rank": "many"}, "rank is 'many'; it takes a whole number"),
        ({"rank": None}, "rank is missing"),
        ({"scale": [1]}, r"scale is \[1\]; it takes a number"),
        ({"keys": "mlp"}, "keys is 'mlp'; it takes a list"),
    ],
)
def test_generate_and_serve_check_an_adapter_before_mlx_lm_loads_it(
    change, words, adapter, broken, model_directory, capsys
):
    """mlx-lm would allocate arrays of that rank, or raise a TypeError."""
    assert check_adapter(adapter) is None
    content = json.loads((adapter / "adapter_config.json").read_text())
    content["lora_parameters"] |= change
    (broken / "adapter_config.json").write_text(json.dumps(content))
    where = ["--model", str(model_directory), "--adapter-path", str(broken)]
    for argv in (["generate", *where, "--prompt", "the cat"], ["serve", *where, "--port", "18479"]):
        assert main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(f"adapter_config.json: .*{words}", line)


def test_generate_serve_and_export_check_a_model_before_mlx_lm_loads_it(
    model_directory, adapter, tmp_path, capsys
):
    directory = tmp_path / "model"
    shutil.copytree(model_directory, directory)
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 10**9}))
    assert check_files(str(model_directory)) == model_directory
    for argv in (
        ["generate", "--prompt", "the cat"],
        ["serve", "--port", "18479"],
        ["export", "gguf", "--output", str(tmp_path / "x.gguf")],
        ["generate", "--prompt", "the cat", "--model", str(model_directory), "--draft-model", str(directory)],
    ):
        model = [] if "--draft-model" in argv else ["--model", str(directory)]
        assert main([*argv, *model]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "num_hidden_layers 1000000000, the weights" in line
    assert not (tmp_path / "x.gguf").exists()


# Modules whose loaders can run code from a file.
UNPICKLING = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "torch"}
NUMPY_LOADERS = {"load", "loads", "fromfile", "memmap"}


def unpickles(code):
    """Return the lines that import a module that unpickles, or call one of numpy's loaders."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            wrong = {name.split(".")[0] for name in names} & UNPICKLING
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            home, _, name = called.rpartition(".")
            wrong = home in ("np", "numpy") and name in NUMPY_LOADERS
            wrong = wrong or any(keyword.arg == "allow_pickle" for keyword in node.keywords)
            wrong = wrong or called in ("__import__", "eval", "exec")
        else:
            continue
        if wrong:
            found.append(node.lineno)
    return found


def test_no_reader_unpickles():
    """The package reads safetensors and JSON only."""
    for path in PACKAGE.rglob("*.py"):
        # The function of a metric is a program that the user names, and runs like one.
        programs = 1 if path.name == "user_metrics.py" else 0
        assert len(unpickles(path.read_text())) == programs, path
    for bad in (
        "import pickle",
        "from torch import load",
        "import numpy as np; np.load('x.npy')",
        "import numpy; numpy.load(file, allow_pickle=True)",
        "reader(path, allow_pickle=True)",
    ):
        assert unpickles(bad), bad


# --- the commands -------------------------------------------------------------------------------------------

KINDS = ("data", "config", "adapter config", "adapter weights", "checkpoint")


@mutations(200)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_lora_never_shows_a_traceback(
    data, kind, adapter, run_directory, model_directory, data_directory, tmp_path, capsys
):
    """The exit status is 0, or nonzero with one line; files of an earlier run stay."""
    place = tmp_path / "place"
    shutil.rmtree(place, ignore_errors=True)
    output = place / "out"
    shutil.copytree(run_directory.parent.parent, output)
    kept = snapshot(output)
    shutil.copytree(data_directory, place / "data")
    argv = ["lora", "--model", str(model_directory), "--train", "--iters", "1", "--val-batches", "1"]
    argv += ["--data", str(place / "data"), "--adapter-path", str(output), "--batch-size", "2"]
    if kind == "data":
        path = place / "data" / "train.jsonl"
        path.write_bytes(data.draw(mutated_bytes(path.read_bytes())))
    elif kind == "config":
        path = place / "c.yaml"
        path.write_bytes(yaml.safe_dump(data.draw(mutated_tree(SETTINGS | {"iters": 1}))).encode())
        argv += ["--config", str(path), "--epochs", "0.1"]
    elif kind == "checkpoint":
        path = output / "checkpoints" / "step-0000002" / STATE_FILE
        path.write_bytes(data.draw(mutated_bytes(path.read_bytes())))
        kept = snapshot(output)
        argv += ["--resume"]
    else:
        shutil.copytree(adapter, place / "adapter")
        path = (
            place
            / "adapter"
            / ("adapter_config.json" if kind == "adapter config" else "adapters.safetensors")
        )
        mutated = mutated_bytes if kind == "adapter config" else mutated_safetensors
        path.write_bytes(data.draw(mutated(path.read_bytes())))
        argv = ["lora", "--model", str(model_directory), "--test", "--test-batches", "1"]
        argv += ["--data", str(place / "data"), "--adapter-path", str(place / "adapter")]
    capsys.readouterr()
    try:
        status = main(argv)
    except SystemExit as stopped:
        status = stopped.code
    errors = capsys.readouterr().err.splitlines()
    assert status in (0, 1, 2), errors
    assert not any("Traceback" in line for line in errors)
    if status:
        assert len(errors) == 1, errors
        assert status == 2 or "not applied" in errors[0], errors
    aside = output / "previous" / "1"
    for path, content in kept.items():
        moved = aside / path.relative_to(output)
        assert (path.exists() and path.read_bytes() == content) or moved.read_bytes() == content, path


OTHERS = {
    "fuse": ["--save-path"],
    "export mlx": ["--output"],
    "export peft": ["--output"],
    "export gguf": ["--output"],
    "export gguf-lora": ["--output"],
    "generate": [],
}


@mutations(60)
@given(data=st.data(), command=st.sampled_from(sorted(OTHERS)))
def test_the_other_commands_never_show_a_traceback(data, command, adapter, model_directory, tmp_path, capsys):
    """A refused file gives one line, leaves no partial output, and the inputs stay unchanged."""
    place = tmp_path / "place"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(model_directory, place / "model")
    shutil.copytree(adapter, place / "adapter")
    name = data.draw(
        st.sampled_from(["adapter/adapter_config.json", "adapter/adapters.safetensors", "model/config.json"])
    )
    path = place / name
    whole = path.read_bytes()
    mutated = (
        mutated_safetensors(whole)
        if path.suffix == ".safetensors"
        else mutated_tree(json.loads(whole)).map(dumped)
    )
    path.write_bytes(data.draw(mutated))
    before = snapshot(place)
    output = place / "out"
    argv = [*command.split(), "--model", str(place / "model"), "--adapter-path", str(place / "adapter")]
    argv += [word for flag in OTHERS[command] for word in (flag, str(output))]
    argv += ["--prompt", "the cat", "--max-tokens", "2"] if command == "generate" else []
    capsys.readouterr()
    try:
        status = main(argv)
    except SystemExit as stopped:
        status = stopped.code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nalora ")]
    # mlx-lm's generator loads the model itself, so that other errors in a config exit with status 1.
    assert status in ((0, 1, 2) if command == "generate" else (0, 2)), errors
    assert len(errors) == bool(status), errors
    after = snapshot(place)
    assert {p: content for p, content in after.items() if p in before} == before
    if status:
        assert after == before
