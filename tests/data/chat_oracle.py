"""What must be trained on, written by hand for each chat template of templates/, without Jinja.

A format says, by concatenating strings, what `generate` puts before an answer (`context`) and what the model then has
to write (`target`). The tests check the contexts against the templates themselves.
"""

# ruff: noqa: RUF001 (DeepSeek's tokens are written with fullwidth bars)

import json
from datetime import datetime
from typing import Any

Messages = list[dict[str, Any]]


def js(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def functions(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [call["function"] for call in message.get("tool_calls", ())]


def before_last_user(messages: Messages, index: int) -> bool:
    return any(message["role"] == "user" for message in messages[index + 1 :])


def split_thought(message: dict[str, Any]) -> tuple[str, str]:
    """Return the reasoning, given apart or inside the content, and the rest."""
    text, thought = message.get("content") or "", message.get("reasoning_content") or ""
    if not thought and "</think>" in text:
        before, _, text = text.rpartition("</think>")
        thought = before.partition("<think>")[2]
    return thought, text


def run_of_tools(messages: Messages, index: int) -> tuple[bool, bool]:
    """Return whether a tool's result is the first and the last of a run of results."""
    first = messages[index - 1]["role"] != "tool"
    last = index + 1 == len(messages) or messages[index + 1]["role"] != "tool"
    return first, last


class Format:
    """A chat format: ChatML unless a subclass says otherwise.

    Attributes:
        ends: the tokens at which generation stops.
        refuses: features of chats that the template raises for.
        drops: features of chats that the template does not render, so that there is nothing to compare.
        modes: arguments of the template to try.
        header: what precedes an answer, without what the generation prompt opens.
        string_arguments: whether the template takes the arguments of calls as JSON texts only.
    """

    bos = ""
    ends: tuple[str, ...] = ("<|im_end|>",)
    refuses: frozenset[str] = frozenset()
    drops: frozenset[str] = frozenset({"tools"})
    modes: tuple[dict[str, Any], ...] = ({},)
    header = "<|im_start|>assistant\n"
    string_arguments = False

    def __init__(self, thinking: bool = True):
        self.thinking = thinking

    def head(self, messages: Messages, tools: Any) -> str:
        return self.bos

    def message(self, messages: Messages, index: int) -> str:
        """Return what stands for a message once an answer is to follow."""
        message = messages[index]
        return f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"

    def opening(self, messages: Messages) -> str:
        return self.header

    def context(self, messages: Messages, tools: Any) -> str:
        """Return what precedes the answer to `messages`."""
        turns = "".join(self.message(messages, index) for index in range(len(messages)))
        return self.head(messages, tools) + turns + self.opening(messages)

    def body(self, message: dict[str, Any]) -> str:
        """Return a turn's text and calls without reasoning."""
        return message["content"]

    def target(self, messages: Messages) -> list[str]:
        """Return what the model has to write for the last message; of several texts, any will do."""
        return [self.body(messages[-1]) + self.ends[0]]

    def continues(self, messages: Messages) -> bool:
        """Return whether the finished turn begins with the context."""
        return True

    def warns(self, messages: Messages) -> bool:
        """Return whether the generation prompt opens something that the finished turn does not have."""
        return not self.continues(messages)

    def first(self, messages: Messages, tools: Any) -> tuple[str, list[str]]:
        """Return what precedes a first turn, and the turn."""
        return self.head(messages, tools) + self.header, self.target(messages)


class ChatmlMarkers(Format):
    pass


class ChatmlNoPrompt(Format):
    header = ""

    def body(self, message):
        return "<|im_start|>assistant\n" + message["content"]

    def first(self, messages, tools):
        return "<|im_start|>assistant\n", [messages[0]["content"] + "<|im_end|>"]


class Qwen25(Format):
    drops = frozenset()

    def head(self, messages, tools):
        given = messages[0]["role"] == "system"
        text = messages[0]["content"] if given else "You are kind."
        listed = "\n\nFunctions:" + "".join("\n" + js(tool) for tool in tools) if tools else ""
        return f"<|im_start|>system\n{text}{listed}<|im_end|>\n"

    def calls(self, message):
        return "\n".join(
            f'<tool_call>\n{{"name": "{f["name"]}", "arguments": {js(f["arguments"])}}}\n</tool_call>'
            for f in functions(message)
        )

    def body(self, message):
        calls = self.calls(message)
        return message["content"] + ("\n" if message["content"] and calls else "") + calls

    def message(self, messages, index):
        message = messages[index]
        if message["role"] == "system":
            return ""
        if message["role"] == "assistant":
            return f"<|im_start|>assistant\n{self.past(messages, index)}<|im_end|>\n"
        if message["role"] == "tool":
            first, last = run_of_tools(messages, index)
            response = f"\n<tool_response>\n{message['content']}\n</tool_response>"
            return ("<|im_start|>user" if first else "") + response + ("<|im_end|>\n" if last else "")
        return super().message(messages, index)

    def past(self, messages, index):
        return self.body(messages[index])


class Qwen3(Qwen25):
    modes = ({}, {"enable_thinking": False})

    def head(self, messages, tools):
        text = messages[0]["content"] if messages[0]["role"] == "system" else ""
        if tools:
            text = (text and text + "\n\n") + "Functions:" + "".join("\n" + js(tool) for tool in tools)
        return text and f"<|im_start|>system\n{text}<|im_end|>\n"

    def opening(self, messages):
        return self.header + ("" if self.thinking else "<think>\n\n</think>\n\n")

    def body(self, message):
        return super().body(message | {"content": split_thought(message)[1].lstrip("\n")})

    def raw(self, message):
        """Return the body of a turn without a think block, which keeps its line breaks."""
        _, text = split_thought(message)
        inline = "</think>" in (message["content"] or "")
        return super().body(message | {"content": text.lstrip("\n") if inline else text})

    def block(self, message):
        return "<think>\n" + split_thought(message)[0].strip("\n") + "\n</think>\n\n"

    def past(self, messages, index):
        message = messages[index]
        if not before_last_user(messages, index) and split_thought(message)[0]:
            return self.block(message) + self.body(message)
        return self.raw(message)

    def target(self, messages):
        message = messages[-1]
        return [(self.block(message) if self.thinking else "") + self.body(message) + "<|im_end|>"]

    def continues(self, messages):
        return self.thinking or not split_thought(messages[-1])[0].strip("\n")

    def first(self, messages, tools):
        return self.head(messages, tools) + self.header, [self.body(messages[0]) + "<|im_end|>"]


class Qwen35(Qwen3):
    def head(self, messages, tools):
        text = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
        if tools:
            text = "Functions:" + "".join("\n" + js(t) for t in tools) + ("\n\n" + text if text else "")
        return text and f"<|im_start|>system\n{text}<|im_end|>\n"

    def opening(self, messages):
        return self.header + ("<think>\n" if self.thinking else "<think>\n\n</think>\n\n")

    def calls(self, message):
        def one(function):
            values = "".join(
                f"<parameter={key}>\n{value if isinstance(value, str) else js(value)}\n</parameter>\n"
                for key, value in function["arguments"].items()
            )
            return f"<tool_call>\n<function={function['name']}>\n{values}</function>\n</tool_call>"

        return "\n".join(map(one, functions(message)))

    def body(self, message):
        text, calls = split_thought(message)[1].strip(), self.calls(message)
        return text + ("\n\n" if text and calls else "") + calls

    def message(self, messages, index):
        message = messages[index]
        stripped = (
            message if message["role"] == "assistant" else message | {"content": message["content"].strip()}
        )
        return super().message([*messages[:index], stripped, *messages[index + 1 :]], index)

    def block(self, message):
        return f"<think>\n{split_thought(message)[0].strip()}\n</think>\n\n"

    def past(self, messages, index):
        message = messages[index]
        kept = not before_last_user(messages, index)
        return (self.block(message) if kept else "") + self.body(message)

    def target(self, messages):
        block = self.block(messages[-1]).removeprefix("<think>\n") if self.thinking else ""
        return [block + self.body(messages[-1]) + "<|im_end|>"]


class Gemma2(Format):
    bos, ends = "<bos>", ("<end_of_turn>", "<eos>")
    refuses = frozenset({"system", "tools", "leading"})
    header = "<start_of_turn>model\n"

    def body(self, message):
        return message["content"].strip()

    def message(self, messages, index):
        role = {"user": "user", "assistant": "model"}[messages[index]["role"]]
        return f"<start_of_turn>{role}\n{messages[index]['content'].strip()}<end_of_turn>\n"


class Gemma3(Gemma2):
    refuses = frozenset({"tools", "leading"})

    def message(self, messages, index):
        if messages[index]["role"] == "system":
            return ""
        text = super().message(messages, index)
        if index and messages[index - 1]["role"] == "system":
            text = text.replace("user\n", f"user\n{messages[0]['content']}\n\n", 1)
        return text


class Gemma4(Format):
    bos, ends = "<bos>", ("<turn|>", "<|tool_response>", "<eos>")
    drops = frozenset({"mixed"})
    modes = ({}, {"enable_thinking": False})
    header = "<|turn>model\n"

    def head(self, messages, tools):
        text = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
        text += "".join(
            f"<|tool>declaration:{t['function']['name']}{{{t['function']['description']}}}<tool|>"
            for t in tools or ()
        )
        text = ("<|think|>\n" if self.thinking else "") + text
        return "<bos>" + (text and f"<|turn>system\n{text}<turn|>\n")

    def inside(self, messages):
        """Return whether the model's turn goes on after the results of its calls."""
        return messages[-1]["role"] == "tool"

    def opening(self, messages):
        empty = "" if self.thinking else "<|channel>thought\n<channel|>"
        return "" if self.inside(messages) else self.header + empty

    def body(self, message):
        def one(function):
            values = ",".join(
                f'{key}:<|"|>{value}<|"|>' if isinstance(value, str) else f"{key}:{value}"
                for key, value in sorted(function["arguments"].items())
            )
            return f"<|tool_call>call:{function['name']}{{{values}}}<tool_call|>"

        return message["content"].strip() + "".join(map(one, functions(message)))

    def thought(self, message):
        return (
            f"<|channel>thought\n{message['reasoning_content']}\n<channel|>"
            if "reasoning_content" in message
            else ""
        )

    def message(self, messages, index):
        message = messages[index]
        if message["role"] == "system":
            return ""
        if message["role"] == "tool":
            return f'<|tool_response>response:{message["name"]}{{value:<|"|>{message["content"]}<|"|>}}<tool_response|>'
        if message["role"] == "user":
            return f"<|turn>user\n{message['content'].strip()}<turn|>\n"
        thought = "" if before_last_user(messages, index) else self.thought(message)
        opened = "" if index and messages[index - 1]["role"] == "tool" else self.header
        return opened + thought + self.body(message) + ("" if "tool_calls" in message else "<turn|>\n")

    def target(self, messages):
        message = messages[-1]
        end = "<|tool_response>" if "tool_calls" in message else "<turn|>"
        kept = self.thinking or self.inside(messages[:-1])
        return [(self.thought(message) if kept else "") + self.body(message) + end]

    def continues(self, messages):
        return self.thinking or self.inside(messages[:-1])

    def first(self, messages, tools):
        return self.head(messages, tools) + self.header, [self.body(messages[0]) + "<turn|>"]


class Llama32(Format):
    bos, ends = "<|begin_of_text|>", ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
    refuses = frozenset({"parallel"})
    drops = frozenset({"mixed"})
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"

    def head(self, messages, tools):
        text = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
        return (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            + ("Environment: ipython\n" if tools else "")
            + f"Date: {datetime.now().strftime('%d %b %Y')}\n\n{text}<|eot_id|>"
        )

    def context(self, messages, tools):
        if tools:
            listed = "".join(js(tool, indent=4) + "\n\n" for tool in tools)
            first = next(index for index, message in enumerate(messages) if message["role"] == "user")
            messages = [dict(message) for message in messages]
            messages[first]["content"] = f"Functions:\n{listed}{messages[first]['content'].strip()}"
        return super().context(messages, tools)

    def body(self, message):
        for function in functions(message):
            return f'{{"name": "{function["name"]}", "parameters": {js(function["arguments"])}}}'
        return message["content"].strip()

    def message(self, messages, index):
        message = messages[index]
        if message["role"] == "system":
            return ""
        role, text = message["role"], self.body(message)
        if role == "tool":
            role, text = "ipython", js(message["content"])
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


class MistralOld(Format):
    bos, ends, header = "<s>", ("</s>",), ""
    refuses = frozenset({"tools", "leading"})

    def message(self, messages, index):
        message = messages[index]
        system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        if message["role"] == "user":
            return f"[INST] {system if index + 1 == len(messages) else ''}{message['content']} [/INST]"
        return "" if message["role"] == "system" else f" {message['content']}</s>"

    def target(self, messages):
        text = messages[-1]["content"] + "</s>"
        return [" " + text] if self.continues(messages) else [" " + text, text]

    def continues(self, messages):
        return messages[0]["role"] != "system"

    def warns(self, messages):
        return False


class MistralNew(Format):
    bos, ends, header = "<s>", ("</s>",), ""
    refuses, drops = frozenset({"leading"}), frozenset()

    def head(self, messages, tools):
        given = messages[0]["role"] == "system"
        return "<s>" + (f"[SYSTEM_PROMPT]{messages[0]['content']}[/SYSTEM_PROMPT]" if given else "")

    def context(self, messages, tools):
        text = self.head(messages, tools)
        for index, message in enumerate(messages):
            if message["role"] == "user":
                if tools and not before_last_user(messages, index):
                    text += f"[AVAILABLE_TOOLS]{js(tools)}[/AVAILABLE_TOOLS]"
                text += f"[INST]{message['content']}[/INST]"
            elif message["role"] == "tool":
                text += f"[TOOL_RESULTS]{message['content']}[/TOOL_RESULTS]"
            elif message["role"] == "assistant":
                text += self.body(message) + "</s>"
        return text

    def body(self, message):
        calls = (f"[TOOL_CALLS]{f['name']}[ARGS]{js(f['arguments'])}" for f in functions(message))
        return message["content"] + "".join(calls)


class DeepSeekR1(Format):
    bos, ends = "<｜begin▁of▁sentence｜>", ("<｜end▁of▁sentence｜>",)
    header = "<｜Assistant｜>"

    def head(self, messages, tools):
        return self.bos + (messages[0]["content"] if messages[0]["role"] == "system" else "")

    def message(self, messages, index):
        role, text = messages[index]["role"], messages[index]["content"]
        if role == "user":
            return f"<｜User｜>{text}"
        return "" if role == "system" else f"<｜Assistant｜>{self.body(messages[index])}<｜end▁of▁sentence｜>"

    def opening(self, messages):
        return "<｜Assistant｜><think>\n"

    def body(self, message):
        return message["content"].rpartition("</think>")[2]

    def continues(self, messages):
        return False


class DeepSeekV3(Format):
    bos, ends = "<｜begin▁of▁sentence｜>", ("<｜end▁of▁sentence｜>",)
    drops, header, string_arguments = frozenset(), "<｜Assistant｜>", True

    def head(self, messages, tools):
        return self.bos + (messages[0]["content"] if messages[0]["role"] == "system" else "")

    def opening(self, messages):
        return "" if messages[-1]["role"] == "tool" else self.header

    def body(self, message):
        calls = "".join(
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{f['name']}\n"
            f"```json\n{js(f['arguments'])}\n```<｜tool▁call▁end｜>"
            for f in functions(message)
        )
        return message["content"] + (calls and f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>")

    def message(self, messages, index):
        message = messages[index]
        if message["role"] == "user":
            return f"<｜User｜>{message['content']}"
        if message["role"] == "tool":
            first, last = run_of_tools(messages, index)
            text = f"<｜tool▁output▁begin｜>{message['content']}<｜tool▁output▁end｜>"
            return "<｜tool▁outputs▁begin｜>" * first + text + "<｜tool▁outputs▁end｜>" * last
        if message["role"] == "system":
            return ""
        return (self.opening(messages[:index]) if index else self.header) + self.body(message) + self.ends[0]


class Phi3(Format):
    ends, header = ("<|end|>", "<|endoftext|>"), "<|assistant|>\n"

    def message(self, messages, index):
        return f"<|{messages[index]['role']}|>\n{messages[index]['content']}<|end|>\n"


class Glm4(Format):
    ends, header = ("<|endoftext|>", "<|user|>", "<|observation|>"), "<|assistant|>"
    drops = frozenset()
    modes = ({}, {"enable_thinking": False})

    def head(self, messages, tools):
        listed = "<|system|>\nFunctions:" + "".join("\n" + js(t) for t in tools) if tools else ""
        return "[gMASK]<sop>" + listed

    def opening(self, messages):
        return self.header + ("" if self.thinking else "\n<think></think>")

    def body(self, message):
        def one(function):
            values = "".join(
                f"<arg_key>{key}</arg_key>\n<arg_value>{value if isinstance(value, str) else js(value)}</arg_value>\n"
                for key, value in function["arguments"].items()
            )
            return f"\n<tool_call>{function['name']}\n{values}</tool_call>"

        text = split_thought(message)[1].strip()
        return (text and "\n" + text) + "".join(map(one, functions(message)))

    def message(self, messages, index):
        message = messages[index]
        if message["role"] == "tool":
            first = "<|observation|>" if run_of_tools(messages, index)[0] else ""
            return f"{first}\n<tool_response>\n{message['content']}\n</tool_response>"
        if message["role"] != "assistant":
            silent = "/nothink" if message["role"] == "user" and not self.thinking else ""
            return f"<|{message['role']}|>\n{message['content']}{silent}"
        thought = "" if before_last_user(messages, index) else split_thought(message)[0].strip()
        return f"<|assistant|>\n<think>{thought}</think>{self.body(message)}"

    def target(self, messages):
        block = f"\n<think>{split_thought(messages[-1])[0].strip()}</think>" if self.thinking else ""
        text = block + self.body(messages[-1])
        # A turn has no end of its own. The model stops at the next role's token.
        return [text + ("<|observation|>" if "tool_calls" in messages[-1] else "<|user|>")]

    def continues(self, messages):
        return self.thinking or not split_thought(messages[-1])[0]

    def first(self, messages, tools):
        return "[gMASK]<sop><|assistant|>\n<think></think>\n", [messages[0]["content"] + "<|user|>"]


class GptOss(Format):
    ends, header = ("<|return|>", "<|call|>", "<|endoftext|>"), "<|start|>assistant"
    refuses, drops = frozenset({"parallel"}), frozenset()

    def head(self, messages, tools):
        text = messages[0]["content"] if messages[0]["role"] == "system" else ""
        text += "".join("\n" + js(tool["function"]) for tool in tools or ())
        developer = text and f"<|start|>developer<|message|>{text}<|end|>"
        return "<|start|>system<|message|>Channels: analysis, commentary, final.<|end|>" + developer

    def parts(self, message, end):
        """Return the analysis and the visible part of an assistant message."""
        thought = message.get("reasoning_content")
        for function in functions(message):
            thought = thought or message["content"]
            visible = f" to=functions.{function['name']}<|channel|>commentary json<|message|>"
            visible += js(function["arguments"]) + "<|call|>"
            break
        else:
            visible = f"<|channel|>final<|message|>{message['content']}{end}"
        return f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else "", visible

    def message(self, messages, index):
        message = messages[index]
        if message["role"] == "user":
            return f"<|start|>user<|message|>{message['content']}<|end|>"
        if message["role"] == "tool":
            name = f"functions.{message['name']} to=assistant"
            return f"<|start|>{name}<|channel|>commentary<|message|>{js(message['content'])}<|end|>"
        if message["role"] == "system":
            return ""
        analysis, visible = self.parts(message, "<|end|>")
        finals = [m for m in messages[index:] if m["role"] == "assistant" and "tool_calls" not in m]
        return "<|start|>assistant" + ("" if finals else analysis) + visible

    def target(self, messages):
        return ["".join(self.parts(messages[-1], "<|return|>"))]

    def first(self, messages, tools):
        header = "<|start|>assistant<|channel|>final<|message|>"
        return self.head(messages, tools) + header, [messages[0]["content"] + "<|return|>"]

    def continues(self, messages):
        """The final text drops the analysis of the calls before it, which its context has."""
        if "tool_calls" in messages[-1]:
            return True
        past = messages[:-1]
        while past and past[-1]["role"] != "user":
            if "tool_calls" in past[-1] and self.parts(past[-1], "")[0]:
                return False
            past = past[:-1]
        return True

    def warns(self, messages):
        return False


class KimiK2(Format):
    drops, header = frozenset(), "<|im_assistant|>assistant<|im_middle|>"

    def head(self, messages, tools):
        listed = f"<|im_system|>tool_declare<|im_middle|>{js(tools)}<|im_end|>" if tools else ""
        given = messages[0]["role"] == "system"
        return listed + ("" if given else "<|im_system|>system<|im_middle|>You are Kim.<|im_end|>")

    def body(self, message):
        calls = "".join(
            f"<|tool_call_begin|>{call['id']}<|tool_call_argument_begin|>"
            f"{js(call['function']['arguments'])}<|tool_call_end|>"
            for call in message.get("tool_calls", ())
        )
        section = calls and f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>"
        return message["content"] + section

    def message(self, messages, index):
        message = messages[index]
        token = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}.get(message["role"], "<|im_system|>")
        number = f"## {message['tool_call_id']}\n" if message["role"] == "tool" else ""
        return f"{token}{message['role']}<|im_middle|>{number}{self.body(message)}<|im_end|>"


class Lfm25(Format):
    bos, drops = "<|startoftext|>", frozenset()

    def head(self, messages, tools):
        text = messages[0]["content"] if messages[0]["role"] == "system" else ""
        if tools:
            text += ("\n" if text else "") + "Tools: " + js(tools)
        return self.bos + (text and f"<|im_start|>system\n{text}<|im_end|>\n")

    def body(self, message):
        calls = ", ".join(
            f"{f['name']}({', '.join(f'{key}={js(value)}' for key, value in f['arguments'].items())})"
            for f in functions(message)
        )
        return message["content"] + (calls and f"<|tool_call_start|>[{calls}]<|tool_call_end|>")

    def thought(self, message):
        return f"<think>{message['reasoning_content']}</think>" if message.get("reasoning_content") else ""

    def message(self, messages, index):
        message = messages[index]
        if message["role"] == "system":
            return ""
        text = self.body(message)
        if message["role"] == "assistant":
            if not before_last_user(messages, index):
                text = self.thought(message) + text
            elif "</think>" in text:
                text = text.rpartition("</think>")[2].strip()
        return f"<|im_start|>{message['role']}\n{text}<|im_end|>\n"

    def target(self, messages):
        return [self.thought(messages[-1]) + self.body(messages[-1]) + "<|im_end|>"]


class CommandR(Format):
    bos, ends, drops = "<BOS_TOKEN>", ("<|END_OF_TURN_TOKEN|>",), frozenset()
    header = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"

    def head(self, messages, tools):
        text = messages[0]["content"] if messages[0]["role"] == "system" else ""
        text += "\n# Tools\n" + js(tools) if tools else ""
        return self.bos + (text and self.turn("SYSTEM", text))

    def turn(self, role, text):
        return f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>{text}<|END_OF_TURN_TOKEN|>"

    def body(self, message):
        actions = ",\n".join(
            f'    {{"tool_name": "{f["name"]}", "parameters": {js(f["arguments"])}}}'
            for f in functions(message)
        )
        if not actions:
            return f"<|START_RESPONSE|>{message['content']}<|END_RESPONSE|>"
        plan = message["content"] and f"<|START_THINKING|>{message['content']}<|END_THINKING|>"
        return f"{plan}<|START_ACTION|>[\n{actions}\n]<|END_ACTION|>"

    def message(self, messages, index):
        message = messages[index]
        if message["role"] == "user":
            return self.turn("USER", message["content"])
        if message["role"] == "assistant":
            return self.turn("CHATBOT", self.body(message))
        if message["role"] == "system":
            return ""
        first, last = run_of_tools(messages, index)
        before = "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[" if first else ", "
        return before + js(message["content"]) + ("]<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>" if last else "")

    def first(self, messages, tools):
        text = messages[0]["content"]
        return self.head(messages, tools) + self.header + "<|START_RESPONSE|>", [
            f"{text}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
        ]


class Nemotron(Format):
    ends, drops, header = ("<SPECIAL_12>",), frozenset(), "<SPECIAL_11>Assistant\n"

    def head(self, messages, tools):
        text = (
            messages[0]["content"].replace("/no_think", "").strip() if messages[0]["role"] == "system" else ""
        )
        return f"<SPECIAL_10>System\n{text}" + (f"\nTools: {js(tools)}" if tools else "") + "\n\n"

    def thinks(self, messages):
        return not any("/no_think" in m["content"] for m in messages if m["role"] in ("system", "user"))

    def opening(self, messages):
        return self.header + ("<think>\n" if self.thinks(messages) else "<think></think>")

    def body(self, message):
        calls = ", ".join(
            f'{{"name": "{f["name"]}", "arguments": {js(f["arguments"])}}}' for f in functions(message)
        )
        return split_thought(message)[1].strip() + (calls and f"<TOOLCALL>[{calls}]</TOOLCALL>")

    def message(self, messages, index):
        message = messages[index]
        if message["role"] == "system":
            return ""
        if message["role"] == "user":
            return f"<SPECIAL_11>User\n{message['content'].strip()}\n"
        if message["role"] == "tool":
            first, last = run_of_tools(messages, index)
            before = "<SPECIAL_11>User\n<TOOL_RESPONSE>[" if first else ", "
            return before + message["content"] + ("]</TOOL_RESPONSE>\n" if last else "")
        thought = "" if before_last_user(messages, index) else split_thought(message)[0].strip()
        thought = thought and f"\n{thought}\n"
        return f"{self.header}<think>{thought}</think>{self.body(message)}<SPECIAL_12>\n"

    def target(self, messages):
        thought = split_thought(messages[-1])[0].strip()
        closed = (thought and thought + "\n") + "</think>" if self.thinks(messages) else ""
        return [closed + self.body(messages[-1]) + "<SPECIAL_12>"]

    def continues(self, messages):
        return self.thinks(messages) == bool(split_thought(messages[-1])[0])

    def warns(self, messages):
        """Return whether the turn has a thought that the prompt closes. An empty one differs in a line break."""
        return not self.thinks(messages) and not self.continues(messages)

    def first(self, messages, tools):
        return self.head(messages, tools) + self.header + "<think></think>", [
            self.body(messages[0]) + "<SPECIAL_12>"
        ]


class Vicuna(Format):
    ends, header = ("</s>",), "ASSISTANT:"

    def head(self, messages, tools):
        return messages[0]["content"] if messages[0]["role"] == "system" else "A chat."

    def message(self, messages, index):
        role, text = messages[index]["role"], messages[index]["content"]
        return {"system": "", "user": f" USER: {text} ", "assistant": f"ASSISTANT: {text}</s>"}[role]

    def body(self, message):
        return " " + message["content"]

    def first(self, messages, tools):
        return "A chat.ASSISTANT: ", [messages[0]["content"] + "</s>"]


class QuestionAnswer(Format):
    ends, header = ("</s>",), ""
    drops = frozenset({"tools", "leading"})  # nothing predicts the first token of a first turn

    def message(self, messages, index):
        role, text = messages[index]["role"], messages[index]["content"]
        return {"system": f"{text}\n", "user": f"Q: {text} A: ", "assistant": f"{text}</s>"}[role]


class Alpaca(Format):
    ends, header = ("</s>",), "### Response:\n"

    def message(self, messages, index):
        role, text = messages[index]["role"], messages[index]["content"]
        names = {"user": "### Instruction:\n", "assistant": "### Response:\n"}
        return f"{names.get(role, '')}{text}\n\n"

    def target(self, messages):
        text = messages[-1]["content"]
        return [text, text + "\n\n"]


FORMATS: dict[str, type[Format]] = {
    "qwen3": Qwen3,
    "qwen3_5": Qwen35,
    "qwen2_5": Qwen25,
    "gemma2": Gemma2,
    "gemma3": Gemma3,
    "gemma4": Gemma4,
    "llama3_2": Llama32,
    "mistral_old": MistralOld,
    "mistral_new": MistralNew,
    "deepseek_r1": DeepSeekR1,
    "deepseek_v3": DeepSeekV3,
    "phi3": Phi3,
    "glm4": Glm4,
    "gpt_oss": GptOss,
    "kimi_k2": KimiK2,
    "lfm2_5": Lfm25,
    "command_r": CommandR,
    "nemotron": Nemotron,
    "vicuna": Vicuna,
    "question_answer": QuestionAnswer,
    "alpaca": Alpaca,
    "chatml_markers": ChatmlMarkers,
    "chatml_no_prompt": ChatmlNoPrompt,
}


# The templates of the real tokenizers: what precedes a turn is what they render.


class RealQwen3(Qwen3):
    modes = ({}, {"enable_thinking": False})


class RealDeepSeekV3(DeepSeekV3):
    # It writes calls only if the content is null, and transformers removes what is null.
    drops = frozenset({"tools"})


class RealMistralNemo(MistralNew):
    drops = frozenset({"mixed"})

    def body(self, message):
        calls = [js(call["function"] | {"id": call["id"]}) for call in message.get("tool_calls", ())]
        return f"[TOOL_CALLS][{', '.join(calls)}]" if calls else message["content"]


REAL_FORMATS: dict[str, type[Format]] = {
    "qwen3": RealQwen3,
    "deepseek_v3": RealDeepSeekV3,
    "mistral_nemo": RealMistralNemo,
}
