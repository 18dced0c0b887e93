"""Chats that the tests of the chat rule render, with what a chat template must know to take them."""

import json
from typing import Any, NamedTuple


class Chat(NamedTuple):
    """A chat, its tools, and what is special in it: templates name the features they refuse or drop."""

    messages: list[dict[str, Any]]
    features: frozenset[str]
    tools: list[dict[str, Any]] | None = None


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Tell about a town",
            "parameters": {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]},
        },
    }
    for name in ("distance", "weather")
]


def system(text="You answer briefly."):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def answer(text, reasoning=None):
    return {"role": "assistant", "content": text} | (
        {"reasoning_content": reasoning} if reasoning is not None else {}
    )


def call(*calls, text="", reasoning=None):
    """Return an assistant message with calls, given as (number, name, arguments)."""
    return answer(text, reasoning) | {
        "tool_calls": [
            {
                "id": f"functions.{name}:{number}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for number, name, arguments in calls
        ]
    }


def result(number, name, text):
    return {"role": "tool", "name": name, "tool_call_id": f"functions.{name}:{number}", "content": text}


BERN, OLTEN = (0, "distance", {"to": "Bern"}), (1, "weather", {"to": "Olten", "days": 2})
BERN_RESULT, OLTEN_RESULT = result(0, "distance", "120 km"), result(1, "weather", "Fog, 3 °C")
LOOP = [
    user("How far is Bern?"),
    call(BERN),
    BERN_RESULT,
    call(OLTEN),
    OLTEN_RESULT,
    answer("120 km, in fog."),
]
AFTER = [user("And back?"), answer("The same.")]


def with_string_arguments(messages):
    """Return the messages with the arguments of calls as JSON texts, as OpenAI's interface gives them."""
    copies = json.loads(json.dumps(messages))
    for message in copies:
        for each in message.get("tool_calls", ()):
            each["function"]["arguments"] = json.dumps(each["function"]["arguments"], ensure_ascii=False)
    return copies


def _thinking(inline: bool, first: str, last: str):
    def turn(text, thought):
        if not thought:
            return answer(text)
        return answer(f"<think>\n{thought}\n</think>\n\n{text}") if inline else answer(text, thought)

    return [
        user("How far is Bern?"),
        turn("Two hours.", first),
        user("And Olten?"),
        turn("One hour.", "It is half way."),
        user("And Rome?"),
        turn("Ten hours.", last),
    ]


_CHATS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "one turn": ("", [user("How far is Bern?"), answer("Two hours.")]),
    "system": (
        "system",
        [system(), user("How far is Bern?"), answer("The fast train needs two hours and you change once.")],
    ),
    "turns": (
        "system",
        [
            system("You know trains."),
            user("Is Bern far?"),
            answer("Yes."),
            user("Is Yes. far?"),
            answer("Yes."),
            user("a"),
            answer("a"),
            user("a"),
            answer("1"),
        ],
    ),
    "flag": ("system", [system("Be brief. /no_think"), user("Far?"), answer("No."), *AFTER]),
    "reasoning once": ("reasoning", _thinking(False, "", "")),
    "reasoning always": ("reasoning", _thinking(False, "Far away.\nBut near.", "Over the mountains.")),
    "reasoning at the end": ("reasoning", _thinking(False, "", "Over the mountains.")),
    "inline reasoning once": ("inline", _thinking(True, "", "")),
    "inline reasoning always": ("inline", _thinking(True, "Far away.\nBut near.", "Over the mountains.")),
    "tool loop": ("tools", LOOP),
    "tool loop within a chat": ("tools system", [system(), *AFTER, *LOOP, *AFTER]),
    "tool loop with reasoning": (
        "tools reasoning",
        [
            user("How far is Bern?"),
            call(BERN, reasoning="I look it up."),
            BERN_RESULT,
            call(OLTEN, reasoning="And the weather."),
            OLTEN_RESULT,
            answer("120 km.", "Now I know."),
            *AFTER,
        ],
    ),
    "parallel calls": (
        "tools parallel",
        [user("Bern?"), call(BERN, OLTEN), BERN_RESULT, OLTEN_RESULT, answer("120 km, fog."), *AFTER],
    ),
    "content beside a call": (
        "tools mixed",
        [user("Bern?"), call(BERN, text="I look."), BERN_RESULT, answer("120 km."), *AFTER],
    ),
    "begins with assistant": ("leading", [answer("Good day."), user("Is Bern far?"), answer("Yes.")]),
    "ends with user": ("", [user("Is Bern far?"), answer("Yes."), user("How far?")]),
    "unicode": (
        "",
        [
            user("Wo liegt 東京? 🚆"),
            answer("Café e\u0301te\u0301 👩\u200d👩\u200d👧 東京は遠い。🇨🇭"),
            user("ñ n\u0303"),
            answer("🚆"),
        ],
    ),
    "blanks": (
        "",
        [
            user(" How far? \n"),
            answer("\n\n  Two hours. \n"),
            user("\tAnd?\n\n"),
            answer("  one\n\n\ntwo  "),
            user("More"),
            answer(" x"),
        ],
    ),
    "lookalikes": (
        "",
        [
            user("<b>bold</b>"),
            answer("<"),
            user("user\n"),
            answer("<b>assistant</b>"),
            user("end"),
            answer("end"),
            user("|>"),
            answer("im_end|>"),
        ],
    ),
}
CHATS = {
    name: Chat(messages, frozenset(features.split()), TOOLS if "tools" in features else None)
    for name, (features, messages) in _CHATS.items()
}
