"""Every form of a row means the same as its content written as messages by hand."""

import copy
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_mlx.core.config import PreferenceConfig, RunConfig, load_run_config
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.notices import Note
from nalora_mlx.data.checks import read_rows
from nalora_mlx.data.preference_tokenization import accepted_rows
from nalora_mlx.data.rows.formats import IMAGES, PREFERENCES, Features, Row, parse_row, parse_rows
from nalora_mlx.data.rows.survey import Survey
from nalora_mlx.lora import build_parser

KEYS = "--prompt-key, --completion-key, --chat-key and --text-key read other keys"


def user(content):
    return {"role": "user", "content": content}


def answer(content, **others):
    return {"role": "assistant", "content": content, **others}


def call(**arguments):
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ASKED, ANSWER = user("Wie weit?"), answer("Zwei Stunden.")
PAIR = [ASKED, ANSWER]
SYSTEM = {"role": "system", "content": "Be short."}
CALLED = [user("q"), answer("", tool_calls=[call(a=1)]), {"role": "tool", "content": "3"}, answer("a")]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "q"}


def parsed(content, **features):
    return parse_row("x:1", content, Features(**features))


def notices(*contents, **features):
    survey = Survey()
    rows, problems = parse_rows(
        [(f"x:{n}", content) for n, content in enumerate(contents, 1)], Features(**features), survey
    )
    assert problems == []
    assert len(rows) == len(contents)
    return survey.notices("train")


def sharegpt(*turns, key="conversations", **others):
    return {key: [{"from": role, "value": value} for role, value in turns], **others}


SAME = {  # name: row, the same content by hand, and the parts of Row that messages do not hold
    "prompt/completion": ({"prompt": "Wie weit?", "completion": "Zwei Stunden."}, PAIR, {}),
    "prompts as messages": ({"prompt": [SYSTEM, ASKED], "completion": [ANSWER]}, [SYSTEM, *PAIR], {}),
    "a cell of JSON": ({"messages": json.dumps(PAIR), "tools": "", "weight": ""}, PAIR, {}),
    "columns": ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, [user("q"), answer("a")], {}),
    "ShareGPT": (sharegpt(("human", "Wie weit?"), ("gpt", "Zwei Stunden.")), PAIR, {}),
    "ShareGPT with a system turn": (sharegpt(("system", "Be short."), ("user", "q"), ("chatgpt", "a")),
                                    [SYSTEM, user("q"), answer("a")], {}),
    "ShareGPT roles": (sharegpt(("Human", "q"), ("model", "a"), ("user", "r"), ("bot", "b"), key="conversation"),
                       [user("q"), answer("a"), user("r"), answer("b")], {}),
    "ShareGPT with role and content": ({"conversations": [{"role": "human", "content": "q"}, answer("a")]},
                                       [user("q"), answer("a")], {}),
    "ShareGPT tools": (
        sharegpt(("human", "q"), ("function_call", '{"name": "f", "arguments": {"a": 1}}'), ("observation", "3"),
                 ("gpt", "a"), tools=json.dumps(TOOLS)), CALLED, {"tools": TOOLS}),
    "ShareGPT parallel calls": (
        sharegpt(("human", "q"), ("function_call", json.dumps([{"name": "f", "arguments": '{"a": 1}'}] * 2)),
                 ("function_response", "3")),
        [user("q"), answer("", tool_calls=[call(a=1)] * 2), CALLED[2]], {}),
    "Alpaca": ({"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Below is an instruction"},
               [user("Add.\n\n1, 2"), answer("3")], {}),
    "Alpaca from a table": ({"instruction": "q", "input": "", "output": "a", "system": "", "history": ""},
                            [user("q"), answer("a")], {}),
    "Alpaca with all keys": (
        {"instruction": "q", "input": "  ", "output": "a", "system": "Be short.", "history": [["x", "y"]]},
        [SYSTEM, user("x"), answer("y"), user("q"), answer("a")], {}),
    "Alpaca history as JSON": ({"instruction": "q", "output": "a", "history": '[["x", "y"]]'},
                               [user("x"), answer("y"), user("q"), answer("a")], {}),
    "Dolly": ({"instruction": "q", "context": "c", "response": "a"}, [user("q\n\nc"), answer("a")], {}),
    "question/answer": ({"question": "q", "answer": "a"}, [user("q"), answer("a")], {}),
    "query/response": ({"query": "q", "response": "a"}, [user("q"), answer("a")], {}),
    "question/response": ({"system_prompt": "Be short.", "question": "q", "response": "a"},
                          [SYSTEM, user("q"), answer("a")], {}),
    "prompt/response": ({"prompt": "q", "response": "a"}, [user("q"), answer("a")], {}),
    "input/output": ({"input": "q", "output": "a"}, [user("q"), answer("a")], {}),
    "padded by Arrow": ({"prompt": None, "completion": None, "text": None, "messages": PAIR}, PAIR, {}),
    "padded by a table": ({"prompt": "", "completion": "", "question": "q", "answer": "a"},
                          [user("q"), answer("a")], {}),
    "system": ({"messages": PAIR, "system": "Be short."}, [SYSTEM, *PAIR], {}),
    "system twice": ({"messages": [SYSTEM, *PAIR], "system": "Be long."}, [SYSTEM, *PAIR], {}),
    "text parts": ({"messages": [user([{"type": "text", "text": "Wie "}, {"type": "text", "text": "weit?"}]), ANSWER]},
                   PAIR, {}),
    "strings as parts": ({"messages": [user(["Wie ", "weit?"]), ANSWER]}, PAIR, {}),
    "null keys": ({"messages": [user("q") | {"name": None, "tool_calls": None}, answer("a", tool_calls=[])]},
                  [user("q"), answer("a")], {}),
    "arguments as a string": (
        {"messages": [user("q"), {"role": "assistant", "content": None,
                                  "tool_calls": [{"type": "function", "function":
                                                  {"name": "f", "arguments": '{"a": 1}'}}]}, *CALLED[2:]]},
        CALLED, {}),
    "no arguments": ({"messages": [user("q"), answer("", tool_calls=[{"name": "f", "arguments": ""}])]},
                     [user("q"), answer("", tool_calls=[{"name": "f", "arguments": {}}])], {}),
    "OpenAI's old calls": (
        {"messages": [user("q"), {"role": "assistant", "content": None,
                                  "function_call": {"name": "f", "arguments": '{"a": 1}'}},
                      {"role": "function", "content": "3"}, answer("a")],
         "functions": [{"name": "f", "parameters": {}}]},
        CALLED, {"tools": TOOLS}),
    "bare functions": ({"messages": PAIR, "tools": [{"name": "f"}]}, PAIR, {"tools": [{"name": "f"}]}),
    "no tools in a cell": ({"messages": PAIR, "tools": "[]"}, PAIR, {}),
    "no tools": ({"messages": PAIR, "tools": []}, PAIR, {}),
    "untrained": ({"messages": [SYSTEM | {"weight": 0}, user("q") | {"train": True}, answer("a", weight=0),
                                user("r"), answer("b", train=False), user("s"), answer("c", weight=1)]},
                  [SYSTEM, user("q"), answer("a"), user("r"), answer("b"), user("s"), answer("c")],
                  {"untrained": frozenset({2, 4})}),
    "untrained after a system prompt": ({"messages": [user("q"), answer("a", weight=0)], "system": "Be short."},
                                        [SYSTEM, user("q"), answer("a")], {"untrained": frozenset({2})}),
    "a weight": ({"messages": PAIR, "weight": 3}, PAIR, {"weight": 3}),
    "a weight from a table": ({"prompt": "Wie weit?", "completion": "Zwei Stunden.", "weight": "2"}, PAIR,
                              {"weight": 2}),
    "a weight of 0": ({"question": "q", "answer": "a", "weight": 0.0}, [user("q"), answer("a")], {"weight": 0}),
    "template arguments": ({"messages": PAIR, "chat_template_kwargs": {"enable_thinking": False}}, PAIR,
                           {"template_args": {"enable_thinking": False}}),
    "preference texts": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [user("q"), answer("a")],
                         {"rejected": [answer("b")], "answer_start": 1}),
    "preference messages": ({"prompt": [SYSTEM, user("q")], "chosen": [answer("a")], "rejected": [answer("b")]},
                            [SYSTEM, user("q"), answer("a")], {"rejected": [answer("b")], "answer_start": 2}),
    "preference chats": (
        {"chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b"), user("r"), answer("c")]},
        [user("q"), answer("a")], {"rejected": [answer("b"), user("r"), answer("c")], "answer_start": 1}),
    "preference chats beside the prompt": (
        {"prompt": "q", "chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")],
         "system": "Be short."},
        [SYSTEM, user("q"), answer("a")], {"rejected": [answer("b")], "answer_start": 2}),
    "preference with an instruction": ({"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"},
                                       [user("q\n\ni"), answer("a")], {"rejected": [answer("b")], "answer_start": 1}),
    "preference in ShareGPT": (
        sharegpt(("human", "q"), chosen={"from": "gpt", "value": "a"}, rejected={"from": "gpt", "value": "b"}),
        [user("q"), answer("a")], {"rejected": [answer("b")], "answer_start": 1}),
    "image parts": ({"messages": [user([IMAGE, TEXT]), answer("a")], "images": ["a.png"]},
                    [user([IMAGE, TEXT]), answer("a")], {"images": ("a.png",)}),
    "images in parts": (
        {"messages": [user([TEXT, {"type": "image_url", "image_url": {"url": "a.png"}},
                            {"type": "image", "image": {"bytes": None, "path": "b.png"}}]), answer("a")]},
        [user([TEXT, IMAGE, IMAGE]), answer("a")], {"images": ("a.png", "b.png")}),
    "images of a message": ({"messages": [user("q") | {"images": ["a.png"]}, answer("a")]},
                            [user([IMAGE, TEXT]), answer("a")], {"images": ("a.png",)}),
    "an image beside a prompt": ({"prompt": "q", "completion": "a", "image": "a.png"},
                                 [user([IMAGE, TEXT]), answer("a")], {"images": ("a.png",)}),
    "image markers": (
        sharegpt(("human", "<image>q"), ("gpt", "a"), ("human", "q<image>"), ("gpt", "b"), images=["a", "b"]),
        [user([IMAGE, TEXT]), answer("a"), user([TEXT, IMAGE]), answer("b")], {"images": ("a", "b")}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_a_row_means_what_its_messages_say(name):
    content, messages, others = SAME[name]
    before = copy.deepcopy(content)
    row = parsed(content)
    assert row == Row("x:1", messages, **others)
    assert content == before
    if not others:
        assert row == parsed({"messages": messages})
    # What was normalized is normal.
    again = parsed({"messages": row.messages, "tools": row.tools, "images": list(row.images)})
    assert (again.messages, again.tools, again.images) == (row.messages, row.tools, row.images)


def test_arrays_of_a_row_are_not_shared_where_they_change():
    content = {
        "messages": [user("q"), answer("", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])]
    }
    row = parsed(content)
    row.messages[1]["tool_calls"][0]["function"]["arguments"]["a"] = 1
    assert content["messages"][1]["tool_calls"][0]["function"]["arguments"] == "{}"


PROBLEMS = {
    "'prompt' must be a list of messages": {"prompt": ["q"], "completion": "a"},
    "'prompt' must be a string, not dict": {"prompt": {"a": 1}, "completion": "a"},
    "begin with an assistant message.*--chat-key completion": {"prompt": "q", "completion": PAIR},
    "message 2 is none": {"messages": [ASKED, {"role": "", "content": "a"}]},
    "message 1 is none": {"conversations": [[{"from": "human", "value": "q"}]]},
    "a string that holds no JSON list": {"messages": "[{'role': 'user', 'content': 'q'}]"},
    "message 2 is from 'gtp'; it must be from one of human,": sharegpt(("human", "q"), ("gtp", "a")),
    "the function call of message 2 must be an object": sharegpt(("human", "q"), ("function_call", "f(1)")),
    "message 2 of 'conversations' has no 'content'": sharegpt(("human", "q"), ("gpt", None)),
    "content' of message 2 must be a string, not int": {"messages": [ASKED, answer(4)]},
    "message 2 of 'messages' has no 'content'": {"messages": [ASKED, answer([])]},
    "message 1 has a part of type 'input_audio'": {"messages": [user([{"type": "input_audio"}]), ANSWER]},
    "message 1 has a part of type None": {"messages": [user([{"value": "q"}]), ANSWER]},
    "message 1 has a part that is a int": {"messages": [user([3]), ANSWER]},
    "message 1 has a text part without": {"messages": [user([{"type": "text", "text": None}]), ANSWER]},
    "'arguments' of a tool call in message 2 must be an object, or a string": {
        "messages": [ASKED, answer("", tool_calls=[{"function": {"name": "f", "arguments": "a=1"}}])]},
    "'arguments' of a tool call in message 2 must be an object,": {
        "messages": [ASKED, answer("", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])]},
    "'tool_calls' of message 2 must be a list": {"messages": [ASKED, answer("", tool_calls={"name": "f"})]},
    "a 'function' in the 'tool_calls' of message 2": {"messages": [ASKED, answer("", tool_calls=[{"function": 1}])]},
    "'weight' of message 2 is 0.5; it must be 0 or 1": {"messages": [ASKED, answer("a", weight=0.5)]},
    "'weight' of message 2 is False": {"messages": [ASKED, answer("a", weight=False)]},
    "'train' of message 1 is 'no'; it must be true or false": {"messages": [ASKED | {"train": "no"}, ANSWER]},
    "message 2 holds half of a surrogate pair": {
        "messages": [ASKED, answer("", tool_calls=[{"function": {"name": "f", "arguments": {"a": "\ud83d"}}}])]},
    "'tools' holds half of a surrogate pair": {"messages": PAIR, "tools": [{"name": "\udc00"}]},
    "'output' must be a string, not int": {"instruction": "q", "output": 5},
    "'input' must be a string, not list": {"instruction": "q", "input": [1], "output": "a"},
    r"'history' must be a list of \[question, answer\]": {"instruction": "q", "output": "a", "history": [["x"]]},
    "'system' must be a string": {"messages": PAIR, "system": {"a": 1}},
    "'functions' must be a list of objects": {"messages": PAIR, "functions": ["f"]},
    "'chat_template_kwargs': tools cannot be given": {"messages": PAIR, "chat_template_kwargs": {"tools": 1}},
    "'chat_template_kwargs': 'x' is not an object": {"messages": PAIR, "chat_template_kwargs": "x"},
    "there is no 'prompt'": {"chosen": "a", "rejected": "b"},
    "one of 'chosen' and 'rejected' is a whole chat": {"prompt": "q", "chosen": PAIR, "rejected": "b"},
    "begin with different messages; they must be answers to the same prompt": {
        "chosen": PAIR, "rejected": [user("x"), ANSWER]},
    "'chosen' has no answer of its own; it ends where the other goes on": {"chosen": [ASKED], "rejected": PAIR},
    "'rejected' ends in a message of role 'user'": {"chosen": PAIR, "rejected": [ASKED, answer("b"), user("r")]},
    "need 1 image, and 'images' holds 0": {"messages": [user([IMAGE]), ANSWER]},
    "need 1 image, and 'images' holds 2": {"messages": [user([IMAGE]), ANSWER], "images": ["a", "b"]},
    "need 1 image, and 'images' holds 3": {"prompt": "<image>", "completion": "a", "images": ["a", "b", "c"]},
    "an image must be a path": {"messages": PAIR, "images": [3]},
    r"no known format; .*--prompt-key.* \(found 'ask', 'say'\)": {"ask": "q", "say": "a"},
    "nested too deeply": {"messages": [user("q") | {"x": nested(5000)}, ANSWER]},
    "holds a list; each row must be an object": [1],
}  # fmt: skip


@pytest.mark.parametrize("what", PROBLEMS)
def test_wrong_rows_are_named(what):
    content = PROBLEMS[what]
    with pytest.raises(InputError, match=f"^x:1: .*{what}"):
        parsed(content)


@pytest.mark.parametrize(
    "weight", [True, -1, 0.5, "x", "0.5", float("nan"), float("inf"), 1001, [1], "1e400"]
)
def test_weights_of_rows_are_whole_numbers(weight):
    with pytest.raises(InputError, match="whole numbers: 0 leaves the row out, 2 counts it twice"):
        parsed({"messages": PAIR, "weight": weight})
    with pytest.raises(InputError, match="whole numbers"):
        parsed({"text": "t", "weight": weight})
    assert parsed({"text": "t", "weight": 2}) == Row("x:1", [], text="t", weight=2)


# --- precedence and keys ------------------------------------------------------------------------------------


def test_the_order_of_forms():
    everything = {
        "prompt": "p", "completion": "c", "messages": PAIR, "chosen": "x", "rejected": "y",
        **sharegpt(("human", "s"), ("gpt", "t")), "instruction": "i", "output": "o", "text": "t",
        "question": "u", "answer": "v", "input": "w",
    }  # fmt: skip
    beginnings = []
    for removed in (
        "completion",
        "messages",
        "chosen",
        "conversations",
        "instruction",
        "text",
        "question",
        "input",
    ):
        row = parsed(everything)
        beginnings.append(row.text or row.messages[0]["content"])
        del everything[removed]
    assert beginnings == ["p", "Wie weit?", "p", "s", "i\n\nw", "t", "u", "w"]
    with pytest.raises(InputError, match="'completion' is missing or an empty cell, and 'prompt' needs it"):
        parsed(everything)
    with pytest.raises(InputError, match="no known format"):
        parsed({"a": "b"})


@pytest.mark.parametrize("keys", [("Question", "Answer"), ("PROMPT", " Completion ")])
def test_capitals_in_keys_do_not_matter(keys):
    row = parsed(dict(zip(keys, ("q", "a"), strict=True)))
    assert row.messages == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_keys_that_the_user_names_come_first_and_must_be_there():
    row = {"ask": "q", "say": "a", "messages": PAIR, "text": "t"}
    assert parsed(row, prompt="ask", completion="say").messages == [user("q"), answer("a")]
    assert parsed(row, text="ask").text == "q"
    assert parsed({"turns": PAIR, "prompt": "p", "completion": "c"}, chat="turns").messages == PAIR
    assert parsed(sharegpt(("human", "q"), ("gpt", "a")), chat="conversations").messages == [
        user("q"),
        answer("a"),
    ]
    # Each row has to have one of the forms that are named.
    assert parsed({"say": "t"}, text="say", chat="turns").text == "t"
    found = r"\(found 'ask', 'say', 'messages', 'text'\)"
    wrong = f"x:1: no 'sya', the key of the completion {found}; --completion-key names another"
    with pytest.raises(InputError, match=rf"{wrong}; did you mean 'say'\?"):
        parsed(row, prompt="ask", completion="sya")
    with pytest.raises(InputError, match=r"no 'turns', the key of the chat .*--chat-key names another$"):
        parsed(row, chat="turns")
    # The usual key goes first if it is named, and is not required.
    alpaca = {"instruction": "q", "output": "a", "text": "t"}
    assert parsed(alpaca, named=frozenset({"text"})).text == "t"
    assert parsed({"question": "q", "answer": "a"}, named=frozenset({"text"})).messages == [
        user("q"),
        answer("a"),
    ]


def test_key_flags_are_mlx_lms_settings(tmp_path):
    given = vars(build_parser("x").parse_args(["--prompt-key", "ask", "--text-key", "text"]))
    assert given["prompt_feature"] == "ask"
    config = load_run_config(None, {name: given[name] for name in ("prompt_feature", "text_feature")})
    features = Features.from_config(config, {"chat_feature": "turns"})
    assert features == Features(prompt="ask", chat="turns", named=frozenset({"text"}))
    assert features.named == {"prompt", "chat", "text"}
    assert Features.from_config(RunConfig()) == Features()


# --- rows that not every run trains on ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "remedy", "features"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ", --completion-key chosen on the", {"completion": "chosen"}),
        ({"chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]}, ", --chat-key chosen on the",
         {"chat": "chosen"}),
        ({"prompt": [user("q")], "chosen": [answer("a")], "rejected": [answer("b")]},
         ", --completion-key chosen on the", {"completion": "chosen"}),
        ({"question": "q", "chosen": "a", "rejected": "b"}, ", --prompt-key question --completion-key chosen on the",
         {"prompt": "question", "completion": "chosen"}),
        (sharegpt(("human", "q"), chosen={"from": "gpt", "value": "a"}, rejected={"from": "gpt", "value": "b"}),
         "put them at the end of the chats", None),
    ],
)  # fmt: skip
def test_supervised_runs_refuse_preferences_and_say_how_to_train_on_the_chosen(row, remedy, features):
    rows, (problem,) = parse_rows([("x:1", row)], Features())
    assert rows == []
    assert problem.startswith("x:1: holds a chosen and a rejected answer")
    assert "; --train-mode dpo trains on both" in problem
    assert remedy in problem
    ((accepted,), problems) = parse_rows([("x:1", row)], Features(), accepted={PREFERENCES})
    assert problems == []
    assert accepted.rejected == [answer("b")]
    if features is not None:
        ((row,), problems) = parse_rows([("x:1", row)], Features(**features))
        assert row == Row("x:1", [user("q"), answer("a")])


def test_runs_on_preferences_prefer_them():
    row = {"messages": PAIR, "prompt": "q", "chosen": "a", "rejected": "b"}
    assert parse_rows([("x:1", row)], Features())[0] == [Row("x:1", PAIR)]
    ((row,), _) = parse_rows([("x:1", row)], Features(), accepted={PREFERENCES})
    assert row.rejected == [answer("b")]


def test_text_models_refuse_images():
    row = {"prompt": "q", "completion": "a", "images": ["a.png"]}
    rows, (problem,) = parse_rows([("x:1", row)], Features())
    assert rows == []
    assert problem == (
        "x:1: holds images, which only vision-language models read; remove the images, or the row"
    )
    assert len(parse_rows([("x:1", row)], Features(), accepted={IMAGES})[0]) == 1
    assert parse_rows([("x:1", row | {"images": []})], Features())[1] == []


# --- notices ------------------------------------------------------------------------------------------------


def test_a_line_says_what_was_understood():
    plain = {"prompt": "q", "completion": "a"}
    assert notices(plain, {"messages": PAIR}, {"text": "t"}) == []
    assert notices({"ask": "q", "say": "a"}, prompt="ask", completion="say") == []
    alpaca = {"instruction": "q", "input": "", "output": "a"}
    assert notices(alpaca) == [
        f"train: 1 row read as Alpaca: 'instruction' -> prompt, 'output' -> completion; {KEYS}"
    ]
    mixed = [alpaca | {"input": "i"}] * 1001 + [alpaca, plain, sharegpt(("human", "q"), ("gpt", "a"))]
    assert notices(*mixed) == [
        "train: 1,002 rows read as Alpaca: 'instruction' and 'input' -> prompt, 'output' -> completion; "
        f"1 row read as prompt/completion; 1 row read as ShareGPT: 'conversations' -> chat; {KEYS}"
    ]


def test_keys_that_nothing_reads_are_named():
    row = {"prompt": "q", "completion": "a"}
    rows = [row | {"id": 1, "source": "w"}] * 2 + [
        row | {"id": 2, "note": "n"},
        row | {"note": "", "extra": None},
    ]
    assert notices(*rows) == [
        "train: nothing reads the keys 'id' (3 rows, x:1), 'source' (2 rows, x:1), 'note' (1 row, x:3); "
        "remove them, or rename them if they matter"
    ]
    assert notices(row | {"id": 1, "note": 2}) == [
        "train: nothing reads the keys 'id', 'note' (1 row, x:1); remove them, or rename them if they matter"
    ]
    assert notices(row | {"systme": "s"}) == [
        "train: nothing reads the keys 'systme' (1 row, x:1); did you mean 'system'?"
    ]
    split = Survey()
    named = Features(prompt="prompt", named=frozenset({"prompt", "completion"}))
    parse_rows([("x:1", row | {"category": "c"})], named, split)
    (found,) = split.notices("train")  # the user has said which keys to read
    assert (found, type(found)) == ("train: nothing reads the keys 'category' (1 row, x:1)", Note)
    (text,) = notices({"text": "t", "system": "s", "tools": TOOLS})
    assert "'system', 'tools' (1 row, x:1)" in text
    (both,) = notices({"messages": PAIR, "conversations": PAIR})
    assert "nothing reads the keys 'conversations'" in both
    (many,) = notices({"text": "t", **{f"k{i}": 1 for i in range(12)}})
    assert "'k9' (1 row, x:1) and 2 more; " in many


def test_parts_of_chats_that_nothing_reads_are_named():
    message = user("q") | {"mood": "calm", "reasoning_content": "r", "weight": 1, "note": None}
    row = {"messages": [message, ANSWER], "system": "s"}
    assert parsed(row).messages[1]["mood"] == "calm"
    assert notices(row, row) == [
        "train: no known chat template reads the keys 'mood' (2 rows, x:1) of messages; "
        "remove them, or rename them if they matter"
    ]
    assert notices({"messages": [SYSTEM, *PAIR], "system": "Be short."}) == []
    assert notices({"messages": [SYSTEM, *PAIR], "system": "Be long."}) == [
        "train: 'system' is not read where the chat has a system message (1 row, x:1); remove one of the two"
    ]


def test_weights_are_said():
    rows = [{"text": "t", "weight": weight} for weight in (1, 0, 2, 0, 70)]
    assert notices(*rows) == [
        "train: 'weight' is above 1 (2 rows, x:3); an epoch holds these rows several times"
    ]


def test_notices_of_a_directory(tmp_path):
    rows = [{"instruction": "q", "output": "a", "id": 1}, {"instruction": "r", "output": "b"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_rows(RunConfig(data=str(tmp_path)), ("train",))
    assert found.problems == []
    assert any("train: 2 rows read as Alpaca" in notice for notice in found.notices)
    assert any(re.search(r"nothing reads the keys 'id' \(1 row, .*train.jsonl:1\)", n) for n in found.notices)


# --- anything ------------------------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["\ud83d", "[]", "{}", "[1]", '{"a": 1}', "<image>", "human", "assistant", "function_call"])
)  # fmt: skip
MESSAGE_KEYS = (
    *("role", "content", "from", "value", "tool_calls", "function_call", "images", "weight", "train"),
    *("type", "text", "image", "function", "name", "arguments", "url"),
)
ROW_KEYS = (
    *(
        "prompt",
        "completion",
        "messages",
        "text",
        "conversations",
        "instruction",
        "input",
        "output",
        "history",
    ),
    *(
        "question",
        "answer",
        "chosen",
        "rejected",
        "system",
        "tools",
        "functions",
        "images",
        "image",
        "weight",
        "label",
    ),
    "chat_template_kwargs",
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MESSAGE_KEYS), inner, max_size=5)
    ),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "function"]) | VALUES, "content": VALUES},
        optional={key: VALUES for key in MESSAGE_KEYS[2:]},
    ),
    max_size=3,
)


@settings(max_examples=90, deadline=None)
@given(
    st.dictionaries(st.sampled_from(ROW_KEYS), VALUES | MESSAGES, max_size=6),
    st.booleans(),
    st.sampled_from(["sft", "dpo", "kto"]),
)
def test_any_object_is_a_row_or_one_problem(content, mask_prompt, mode):
    before = repr(content)
    survey = Survey()
    rows, problems = parse_rows(
        [("x:1", content)],
        Features(mask_prompt=mask_prompt),
        survey,
        accepted_rows(PreferenceConfig(train_mode=mode)),
    )
    assert len(rows) + len(problems) == 1
    assert all(problem.startswith("x:1: ") and "\n" not in problem for problem in problems)
    assert repr(content) == before
    survey.notices("train")
    for row in rows:
        json.dumps([row.messages, row.tools, row.text, row.rejected], ensure_ascii=False).encode()
        messages = [*row.messages, *(row.rejected or ())]
        assert all(isinstance(message["content"], str | list) for message in messages)
        if mode != "sft":
            assert (row.rejected is None) == (row.label is not None)
            assert row.label is None or mode == "kto"
            assert 0 < row.answer_start < len(row.messages)
            assert messages[-1]["role"] == row.messages[-1]["role"] == "assistant"
        assert all(row.messages[index]["role"] == "assistant" for index in row.untrained)
        parts = [part for m in row.messages for part in m["content"] if isinstance(part, dict)]
        assert sum(part["type"] == "image" for part in parts) == len(row.images)
