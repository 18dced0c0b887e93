"""nalora serve with several adapters on one base model, and with stop words: requests to a server in this process."""

import itertools
import json
import random
import re
import shutil
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from unittest import mock

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate, server
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.utils import load

from nalora_mlx.__main__ import main
from nalora_mlx.adapters.attach import adapt, adapt_dora
from nalora_mlx.adapters.files import adapter_config, adapter_files
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.core.errors import InputError, RunError
from nalora_mlx.serve.model_names import parse_adapters
from nalora_mlx.serve.server import Handler, check_mlx_lm, patches
from nalora_mlx.serve.stop_words import AnswerText
from tests.conftest import random_adapters

QUESTIONS = [
    f"what colour is the {animal} {number} ?"
    for animal in ("cat", "dog", "bird")
    for number in ("one", "two")
]
TOKENS = 12


def save(model, directory):
    storage.write_directory(directory, adapter_files(model, adapter_config(model)))
    return directory


@pytest.fixture(scope="module")
def adapters(model_directory, tmp_path_factory):
    """Return three adapters: NA-LoRA on all projections, LoRA on one, and DoRA, each of its own rank."""
    root = tmp_path_factory.mktemp("adapters")
    made = {}
    for index, (name, attach, settings) in enumerate(
        [
            ("gated", adapt, {"rank": 4}),
            ("values", adapt, {"rank": 2, "keys": ("self_attn.v_proj",), "num_layers": 2}),
            ("dora", adapt_dora, {"rank": 3, "keys": ("self_attn.q_proj", "mlp.down_proj")}),
        ]
    ):
        model, _ = load(str(model_directory))
        mx.random.seed(index)  # or the answers, which may be empty, would depend on the tests before
        attach(model, NALoRAConfig(**{"scale": 4.0, "num_layers": -1} | settings))
        random_adapters(model, seed=index, size=0.4)
        made[name] = save(model, root / name)
    return made


@pytest.fixture(scope="module")
def expected(model_directory, adapters):
    """Return the answers of unmodified mlx-lm: model name -> question -> answer."""
    found = {}
    for name, adapter in {"base": None, **adapters}.items():
        model, tokenizer = load(str(model_directory), adapter_path=None if adapter is None else str(adapter))
        found[name] = {}
        for question in QUESTIONS:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            found[name][question] = generate(model, tokenizer, prompt, max_tokens=TOKENS)
    assert len({tuple(answers.values()) for answers in found.values()}) == len(found)
    return found


@contextmanager
def running(model, *adapters, flags=(), plain=False):
    """Yield the port of a server: ours, or that of unmodified mlx-lm."""
    served = parse_adapters(str(model), list(map(str, adapters)))
    settings = {"chat_template": None, "chat_template_args": None}
    replaced = {"run": server.run} if plain else patches(served, settings, "")
    argv = ["serve", "--model", str(model), "--max-tokens", str(TOKENS), "--log-level", "ERROR", *flags]
    with mock.patch("sys.argv", argv), mock.patch.multiple(server, **replaced):
        with mock.patch.object(server, "run") as run:
            server.main()
        generator = server.ResponseGenerator(run.call_args.args[2], LRUPromptCache(10))
    kind = server.APIHandler if plain else Handler
    http = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: kind(generator, *args, system_fingerprint=""))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield http.server_address[1]
    finally:
        http.shutdown()
        generator.stop_and_join()
        thread.join()
        http.server_close()


def send(port, path, body=None):
    """Return the status and the body of the answer to a request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def chat(port, question, **body):
    """Return the answer to a question: text, finish reason and usage; `stream=True` joins the chunks."""
    endpoint = "/v1/chat/completions"
    body = {"messages": [{"role": "user", "content": question}], **body}
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    status, text = send(port, endpoint, body)
    assert status == 200, text
    return parse(text, body.get("stream", False))


def parse(text, stream):
    if not stream:
        answer = json.loads(text)
        choice = answer["choices"][0]
        words = choice["text"] if "text" in choice else choice["message"]["content"]
        return words or "", choice["finish_reason"], answer["usage"]
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    *chunks, usage = map(json.loads, events[:-1])
    choices = [chunk["choices"][0] for chunk in chunks]
    pieces = [c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices]
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    return "".join(pieces), choices[-1]["finish_reason"], usage["usage"]


# --- adapters -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(model_directory, adapters):
    named = [f"gated={adapters['gated']}", adapters["values"], f"d.o-r:a={adapters['dora']}"]
    with running(model_directory, *named) as port:
        yield port


SERVED = {"base": "base", "gated": "gated", "values": "values", "d.o-r:a": "dora"}


def test_the_model_of_a_request_chooses_the_adapter(several, model_directory, expected):
    for name, adapter in SERVED.items():
        for question in QUESTIONS[:2]:
            assert chat(several, question, model=name)[0].strip() == expected[adapter][question].strip()
    path = str(model_directory.resolve())
    for body in ({}, {"model": "default_model"}, {"model": path}):
        assert chat(several, QUESTIONS[0], **body)[0].strip() == expected["base"][QUESTIONS[0]].strip()


def test_concurrent_requests_for_all_adapters_are_answered_as_by_each_alone(several, expected):
    requests = [(name, question) for name in SERVED for question in QUESTIONS] * 2
    random.Random(0).shuffle(requests)
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(lambda request: chat(several, request[1], model=request[0], top_k=0)[0], requests)
        )
    wrong = [
        (name, question)
        for (name, question), answer in zip(requests, answers, strict=True)
        if answer.strip() != expected[SERVED[name]][question].strip()
    ]
    assert wrong == []


def test_adapters_share_no_prompt_cache(several):
    question = "one two three cat dog bird red blue green"
    cached = [
        chat(several, question, model=name)[2]["prompt_tokens_details"]["cached_tokens"]
        for name in [*SERVED, *SERVED]
    ]
    start = len(["<|im_start|>user"])  # no adapter has seen more of this prompt before
    assert max(cached[:4]) <= start + 1
    assert min(cached[4:]) > len(question.split())


def test_the_base_is_loaded_once_and_adapters_share_its_arrays(model_directory, adapters):
    served = parse_adapters(str(model_directory), [f"{n}={d}" for n, d in adapters.items()])
    before = mx.get_active_memory()
    settings = {"chat_template": None, "chat_template_args": None}
    with (
        mock.patch.multiple(server, **patches(served, settings, "")),
        mock.patch.object(server, "run") as run,
        mock.patch("sys.argv", ["serve", "--model", str(model_directory)]),
    ):
        server.main()
    used = mx.get_active_memory() - before
    base = sum(array.nbytes for _, array in tree_flatten(load(str(model_directory))[0].parameters()))
    own = sum(
        array.nbytes
        for path in adapters.values()
        for array in mx.load(str(path / "adapters.safetensors")).values()
    )
    assert used < base + 2 * own + 0.2 * base
    assert run.call_count == 1


def test_models_are_listed_and_others_refused_by_name(several, model_directory):
    base = str(model_directory.resolve())
    listed = json.loads(send(several, "/v1/models")[1])
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == [base, "gated", "values", "d.o-r:a"]
    assert json.loads(send(several, "/v1/models/values")[1])["id"] == "values"
    for path, body in (
        ("/v1/models/none", None),
        ("/v1/completions", {"model": "gpt-4o", "prompt": "the"}),
        ("/v1/chat/completions", {"model": "value", "messages": [{"role": "user", "content": "the"}]}),
    ):
        status, text = send(several, path, body)
        error = json.loads(text)["error"]
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "gated, values, d.o-r:a" in error["message"]


def test_names_of_adapters(tmp_path):
    (tmp_path / "lr=1e-4").mkdir()
    alone = parse_adapters("m", [str(tmp_path / "lr=1e-4")])
    assert (alone.adapter, alone.adapters) == (str(tmp_path / "lr=1e-4"), {})
    assert alone.find("anything") == "default_model"
    assert parse_adapters("m", ["a=x/y"]).adapters == {"a": "x/y"}
    assert parse_adapters("m", ["x/one", "x/two/"]).adapters == {"one": "x/one", "two": "x/two"}
    for values, message in (
        (["x/one", "y/one"], "the name one is taken by x/one; give NAME=DIR"),
        (["base=x", "default_model=y"], "base is the base model.*default_model is the base model"),
        (["m=x"], "m is the base model"),
    ):
        with pytest.raises(InputError, match=message):
            parse_adapters("m", values)


def test_adapters_that_cannot_be_served_are_one_line(model_directory, adapters, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    mx.save_safetensors(str(full / "adapters.safetensors"), {"model.norm.weight": mx.ones((32,))})
    (full / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
    other = tmp_path / "other"
    files = {path.name: storage.copy_writer(path) for path in adapters["values"].iterdir()}
    weights = dict(mx.load(str(adapters["values"] / "adapters.safetensors")))
    weights = {name.replace("layers.2", "layers.7"): array for name, array in weights.items()}
    storage.write_directory(other, files | {"adapters.safetensors": storage.arrays_writer(weights)})
    serve = ["serve", "--model", str(model_directory), "--port", "38271", "--adapter-path"]
    for directory, message in (
        (tmp_path, "has no adapter_config.json"),
        (full, "holds fully trained weights, which cannot share the base model's; serve them alone"),
        (other, "cannot be served: .*layers.7.*not an adapter parameter"),
    ):
        assert main([*serve, f"a={adapters['dora']}", "--adapter-path", f"b={directory}"]) == 2
        assert re.search(f"--adapter-path (b=)?{directory}: {message}", capsys.readouterr().err)


# --- stop words ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port(model_directory):
    with running(model_directory) as port:
        yield port


def complete(port, question, **body):
    """Return the completion of a question; see `chat`."""
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    status, text = send(port, "/v1/completions", {"prompt": question, **body})
    assert status == 200, text
    return parse(text, body.get("stream", False))


def cut_out(text, count=12):
    """Yield stop words that are parts of a text, each with the text before the first of them."""
    generator = random.Random(0)
    for _ in range(count if len(text) > 1 else 0):
        start = generator.randrange(1, len(text))
        word = text[start : start + generator.choice((1, 2, 4, 9))]
        yield word, text[: text.find(word)]


def text_before_stop(text, words):
    """Return the text before the stop word that is complete first, read letter by letter; None without one."""
    for end in range(1, len(text) + 1):
        if complete := [word for word in words if text[:end].endswith(word)]:
            return text[: end - max(map(len, complete))]
    return None


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize(
    "settings", [{}, {"stream": True}, {"seed": 0}, {"seed": 0, "stream": True, "logprobs": True}]
)
def test_an_answer_ends_before_a_stop_word(port, ask, settings):
    """With a seed, mlx-lm generates one answer at a time, by other code than its batches."""
    whole, reason, usage = ask(port, QUESTIONS[0], **settings)
    assert (reason, usage["completion_tokens"]) == ("length", TOKENS)
    for word, before in cut_out(whole):
        text, reason, usage = ask(port, QUESTIONS[0], stop=word, **settings)
        assert (text, reason) == (before, "stop"), word
        # The tiny model's tokens are words, and the space after a word comes with the next one. The last token is that
        # which completes the stop word.
        assert usage["completion_tokens"] == len(f"{before}{word}".split()) + word.endswith(" "), word
    words = ["zzz", whole[7:9], whole[6:9], whole[5:9]]
    assert ask(port, QUESTIONS[0], stop=words, **settings)[:2] == (text_before_stop(whole, words), "stop")
    unseen = [whole + "!", "", "zzz"]
    assert ask(port, QUESTIONS[0], stop=unseen, **settings)[:2] == (whole, "length")


@pytest.mark.parametrize("settings", [{}, {"seed": 0}])
def test_generation_stops_at_a_stop_word(port, settings):
    """Counts the tokens that the generation thread made, of which the answer might leave some out."""
    whole = chat(port, QUESTIONS[0])[0]
    with mock.patch.object(server, "Response", wraps=server.Response) as response:
        used = [
            chat(port, QUESTIONS[0], stop=word, **settings)[2]["completion_tokens"]
            for word, _ in cut_out(whole)
        ]
        used.append(chat(port, QUESTIONS[0], **settings)[2]["completion_tokens"])
    assert response.call_count == sum(used)


def test_unmodified_mlx_lm_has_the_fault(model_directory):
    """Fails once mlx-lm is right; then remove `StopWords` and `until_stop_word`."""
    with running(model_directory, plain=True) as port:
        whole = chat(port, QUESTIONS[0])[0]
        found = [chat(port, QUESTIONS[0], stop=word)[:2] for word, _ in cut_out(whole)]
    right = [(before, "stop") for _, before in cut_out(whole)]
    assert sum(a == b for a, b in zip(found, right, strict=True)) < len(right) / 2


@pytest.mark.parametrize("stream", [False, True])
def test_end_tokens_end_an_answer_and_its_last_words_are_kept(port, model_directory, tmp_path, stream):
    tokens = [word for word in chat(port, QUESTIONS[0])[0].split()]
    end = next(i for i in range(3, TOKENS) if tokens[i] not in tokens[:i])
    ending = shutil.copytree(model_directory, tmp_path / "model")
    vocabulary = json.loads((ending / "tokenizer.json").read_text())["model"]["vocab"]
    config = json.loads((ending / "config.json").read_text())
    ends = {"eos_token_id": [2, vocabulary[tokens[end]]]}
    (ending / "config.json").write_text(json.dumps(config | ends))
    with running(ending) as server_port:
        for stop in (None, "zzz", f"{tokens[end - 1]}zz"):  # the last is held back until the answer ends
            text, reason, usage = chat(server_port, QUESTIONS[0], stop=stop, stream=stream)
            assert (text.split(), reason) == (tokens[:end], "stop"), stop
            assert usage["completion_tokens"] == end + 1


def test_concurrent_requests_with_stop_words(several, expected):
    def ask(job):
        name, question, word = job
        return chat(several, question, model=name, stop=[word])[0]

    jobs = [
        (name, question, word)
        for name in SERVED
        for question in QUESTIONS
        for word, _ in cut_out(expected[SERVED[name]][question], 2)
    ]
    random.Random(0).shuffle(jobs)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, jobs))
    for (name, question, word), answer in zip(jobs, answers, strict=True):
        whole = expected[SERVED[name]][question]
        assert answer == whole[: whole.find(word)]


@pytest.mark.parametrize("stop", [5, [5], {"a": 1}, ["the", None]])
def test_other_stop_words_are_refused(port, stop):
    """They end the generation thread of mlx-lm's server, and with it all requests."""
    status, text = send(port, "/v1/completions", {"prompt": "the cat", "stop": stop})
    assert status == 400
    assert "stop must be a string or a list of strings" in json.loads(text)["error"]["message"]
    assert chat(port, QUESTIONS[0])[1] == "length"


class Letters:
    """A streaming detokenizer whose tokens are pieces of text; it holds spaces back, as mlx-lm's do."""

    def __init__(self, pieces):
        self.pieces, self.text, self.offset, self.held = pieces, "", 0, ""

    def add_token(self, token):
        self.held += self.pieces[token]
        if not self.held.endswith(" "):
            self.finalize()

    def finalize(self):
        self.text, self.held = self.text + self.held, ""

    @property
    def last_segment(self):
        segment, self.offset = self.text[self.offset :], len(self.text)
        return segment


def test_the_text_before_a_stop_word_does_not_depend_on_tokens():
    generator = random.Random(0)
    for _ in range(3000):
        text = "".join(generator.choices("ab ", (3, 3, 1), k=generator.randrange(1, 14)))
        words = ["".join(generator.choices("ab ", (3, 3, 1), k=generator.randrange(1, 6))) for _ in range(3)]
        cuts = sorted({0, len(text), *generator.choices(range(len(text)), k=4)})
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        answer, found = AnswerText(Letters(pieces), words), ""
        want = text_before_stop(text, words)
        for token in range(len(pieces)):
            found += answer.add(token)
            assert (text if want is None else want).startswith(found)
            if answer.ended:
                break
        else:
            found += answer.finish()
        assert found == (text if want is None else want), (text, words, pieces)
        assert answer.ended == (want is not None)


@pytest.mark.parametrize("change", ["missing", "parameters", "default"])
def test_another_server_in_mlx_lm_is_one_clear_error(monkeypatch, change):
    check_mlx_lm()
    if change == "missing":
        monkeypatch.delattr(server.ResponseGenerator, "_make_state_machine")
    elif change == "parameters":
        monkeypatch.setattr(server.APIHandler, "handle_completion", lambda self, request: None)
    else:
        monkeypatch.setattr(server.APIHandler, "handle_completion", lambda self, request, stop_words: None)
    part = "_make_state_machine" if change == "missing" else "handle_completion"
    with pytest.raises(RunError, match=rf"mlx-lm .* has changed \(.*{part}\); install mlx-lm 0.32.2"):
        check_mlx_lm()
