"""Generate the data of this example: conversations with tool calls, in two forms.

python examples/persona/make.py [DIRECTORY]

Writes to DIRECTORY, by default the directory of this file:

- {train,valid,test}.jsonl with `tools`, `tool_calls` and tool results, for models whose chat template supports them
- plain/{train,valid,test}.jsonl, the same conversations with all of this as text, for other models
- system.txt, the system message of the plain form

The output is always the same.
"""

import json
import random
import sys
from pathlib import Path

SEED = 20260701
SIZES = {"train": 280, "valid": 40, "test": 40}

PERSONA = "You are Pim, the harbour clerk of Tern Island."
PLAIN_TOOLS = (
    "You can look things up: tides(day), ferries(to, day), berth(metres, nights). To do so, answer with the call "
    'alone, such as <tool_call>{"name": "tides", "arguments": {"day": "Friday"}}</tool_call>'
)


def tool(name, description, **parameters):
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


TOOLS = [
    tool("tides", "Times of high and low water.", day=("string", "day of the week")),
    tool("ferries", "Departures of the ferry.", to=("string", "where to"), day=("string", "day of the week")),
    tool(
        "berth",
        "Find a free berth and its price.",
        metres=("integer", "length of the boat"),
        nights=("integer", "nights to stay"),
    ),
]

# "train" entries occur in all files, "held out" entries only in valid.jsonl and test.jsonl.
PLACES = {
    "train": ["Skerry", "Port Wick", "Gull Bay", "Saltmouth", "Easter Quay", "Fallow Isle", "Kirkness"],
    "held out": ["Morrow Sound", "Dunholm", "Brandy Cove"],
}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven"]

ASK_TIDE = {
    "train": [
        "When is {water} water on {day}?",
        "What time is {water} tide {day}?",
        "I want to go out on {day}. When do we have {water} water?",
        "{day}, {water} water, please.",
        "Can you look up {water} tide for {day}?",
        "Hello! Could you tell me the hours of {water} water this {day}?",
    ],
    "held out": ["Tell me about {water} tide on {day}, please.", "At what hours is {water} water {day}?"],
}
ASK_FERRY = {
    "train": [
        "When is the {which} ferry to {place} on {day}?",
        "I have to be in {place} on {day}. When does the {which} boat leave?",
        "{which} ferry to {place}, {day}?",
        "Hi there, my sister lives in {place}. What time does the {which} ferry go on {day}?",
        "Please look up the {which} boat to {place} for {day}.",
    ],
    "held out": [
        "We are off to {place} {day}. What is the {which} ferry that we could take?",
        "At what time on {day} does the {which} boat sail to {place}?",
    ],
}
ASK_BERTH = {
    "train": [
        "Do you have a berth for a boat of {metres} metres for {nights} {night}?",
        "We would like to stay {nights} {night}. The boat is {metres} m long.",
        "Is there room for us? {metres} metres, {nights} {night}.",
        "Good morning, I need a place for my {metres} metre ketch, {nights} {night}.",
    ],
    "held out": ["Could my {metres} metre sloop lie in your harbour for {nights} {night}?"],
}
VAGUE_BERTH = {
    "train": ["I need a berth.", "Can I moor here?", "Do you have room for my boat?", "Is a berth free?"],
    "held out": ["We are looking for a place to tie up.", "May we stay in the harbour?"],
}
GIVE_SIZE = {
    "train": [
        "{metres} metres, {nights} {night}.",
        "She is {metres} m long and we stay {nights} {night}.",
        "{nights} {night}, and the boat has {metres} metres.",
    ],
    "held out": ["We stay {nights} {night}. Length: {metres} metres."],
}
ANOTHER_DAY = {
    "train": ["And on {day}?", "What about {day}?", "And {day}?", "Sorry, I meant {day}."],
    "held out": ["How is it on {day}?"],
}
HELLO = {
    "train": ["Hello, who are you?", "Hi!", "Who am I talking to?", "Good evening. What is your name?"],
    "held out": ["Hey, and you are?"],
}
HELLO_ANSWERS = [
    "Ahoy, skipper! Pim here, harbour clerk of Tern Island. Tides, ferries or a berth?",
    "Ahoy, skipper! I am Pim and I keep the harbour of Tern Island. What shall I look up?",
]
OFF_TOPIC = {
    "train": [
        "Can you write a poem about love?",
        "What is the capital of France?",
        "Help me with my tax return.",
        "Which phone should I buy?",
        "How do I bake bread?",
        "Who won the football match yesterday?",
        "Translate 'good night' into Spanish.",
        "What do you think of the government?",
        "Explain how a computer works.",
        "Give me a recipe for pancakes.",
        "What is 17 times 23?",
        "Tell me a joke about cats.",
    ],
    "held out": [
        "Can you recommend a novel?",
        "How far away is the moon?",
        "Write an email to my boss.",
        "What is the best way to learn the piano?",
    ],
}
OFF_TOPIC_ANSWERS = [
    "That lies beyond my harbour wall, skipper. Ask me about tides, ferries or berths.",
    "Out of my waters, skipper! I know tides, ferries and berths, no more.",
]
THANKS = {
    "train": ["Thanks!", "Thank you, that is all.", "Great, thanks for the help.", "Perfect. Bye!"],
    "held out": ["Cheers, that helps a lot."],
}
THANKS_ANSWERS = ["Fair winds, skipper!", "Fair winds, skipper, and a dry deck!"]


class ConversationGenerator:
    """Generates random conversations, for the training file or for the held-out files."""

    def __init__(self, rng, pool):
        self.rng, self.pool = rng, pool

    def pick(self, table):
        """Return a random entry of a table. For held-out files, use a held-out entry half of the time."""
        held_out = self.pool == "held out" and self.rng.random() < 0.5
        return self.rng.choice(table["held out" if held_out else "train"])

    def time(self, low, high):
        return f"{self.rng.randrange(low, high):02d}:{self.rng.randrange(0, 60, 5):02d}"

    def look_up(self, name, arguments, result, answer):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return [
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "name": name, "content": json.dumps(result)},
            {"role": "assistant", "content": answer},
        ]

    def tides(self, day, water):
        result = {"high": [self.time(1, 6), self.time(13, 18)], "low": [self.time(7, 12), self.time(19, 24)]}
        first, second = result[water]
        answer = f"Aye, skipper. {water.capitalize()} water on {day} is at {first} and {second}."
        return self.look_up("tides", {"day": day}, result, answer)

    def ferries(self, place, day, which):
        times = [self.time(6, 9), self.time(11, 14), self.time(17, 20)][: self.rng.choice([0, 2, 3, 3])]
        if times:
            time = times[0 if which == "first" else -1]
            answer = f"Aye, skipper. The {which} boat to {place} on {day} leaves at {time}."
        else:
            answer = f"No boat to {place} on {day}, skipper. Shall I try another day?"
        return self.look_up("ferries", {"to": place, "day": day}, {"departures": times}, answer)

    def berth(self, metres, nights):
        night = "night" if nights == 1 else "nights"
        if self.rng.random() < 0.2:
            result = {"berth": None}
            answer = f"No room for {metres} metres, skipper. The harbour is full."
        else:
            result = {
                "berth": self.rng.choice("ABCD") + str(self.rng.randrange(1, 20)),
                "euros": 2 * metres * nights,
            }
            price = f"{result['euros']} euros for {NUMBERS[nights]} {night}"
            answer = f"Aye, skipper. Berth {result['berth']} is yours, {price}."
        return self.look_up("berth", {"metres": metres, "nights": nights}, result, answer)

    def stay(self):
        """Return the length of a boat, the number of nights, and both as words for a question."""
        nights = self.rng.randrange(1, 8)
        words = {"nights": NUMBERS[nights] if self.rng.random() < 0.6 else nights}
        metres = self.rng.randrange(5, 19)
        return metres, nights, {**words, "metres": metres, "night": "night" if nights == 1 else "nights"}

    def user_turn(self, text):
        return {"role": "user", "content": text[0].upper() + text[1:]}

    def about_tides(self):
        water = self.rng.choice(["high", "low"])
        day, other = self.rng.sample(DAYS, 2)
        turns = [self.user_turn(self.pick(ASK_TIDE).format(day=day, water=water)), *self.tides(day, water)]
        if self.rng.random() < 0.5:
            turns += [self.user_turn(self.pick(ANOTHER_DAY).format(day=other)), *self.tides(other, water)]
        return turns

    def about_ferries(self):
        place, which = self.pick(PLACES), self.rng.choice(["first", "last"])
        day, other = self.rng.sample(DAYS, 2)
        question = self.pick(ASK_FERRY).format(which=which, place=place, day=day)
        turns = [self.user_turn(question), *self.ferries(place, day, which)]
        if self.rng.random() < 0.5:
            turns += [
                self.user_turn(self.pick(ANOTHER_DAY).format(day=other)),
                *self.ferries(place, other, which),
            ]
        return turns

    def about_a_berth(self):
        metres, nights, words = self.stay()
        if self.rng.random() < 0.5:
            return [self.user_turn(self.pick(ASK_BERTH).format(**words)), *self.berth(metres, nights)]
        follow_up = "Aye, skipper. How long is your boat, and how many nights do you stay?"
        return [
            self.user_turn(self.pick(VAGUE_BERTH)),
            {"role": "assistant", "content": follow_up},
            self.user_turn(self.pick(GIVE_SIZE).format(**words)),
            *self.berth(metres, nights),
        ]

    def small_talk(self, table, answers):
        return [
            self.user_turn(self.pick(table)),
            {"role": "assistant", "content": self.rng.choice(answers)},
        ]

    def conversation(self):
        turns = self.small_talk(HELLO, HELLO_ANSWERS) if self.rng.random() < 0.2 else []
        kind = self.rng.choice(["tides", "ferries", "ferries", "berth", "off topic"])
        if kind == "tides":
            turns += self.about_tides()
        elif kind == "ferries":
            turns += self.about_ferries()
        elif kind == "berth":
            turns += self.about_a_berth()
        else:
            turns += self.small_talk(OFF_TOPIC, OFF_TOPIC_ANSWERS)
            if self.rng.random() < 0.5:
                turns += self.rng.choice([self.about_tides, self.about_a_berth])()
        if self.rng.random() < 0.25:
            turns += self.small_talk(THANKS, THANKS_ANSWERS)
        return turns


def plain(message):
    """Return a message as text only, with tool calls and results in tags."""
    if "tool_calls" in message:
        calls = [json.dumps(call["function"]) for call in message["tool_calls"]]
        return {"role": "assistant", "content": "\n".join(f"<tool_call>{call}</tool_call>" for call in calls)}
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>{message['content']}</tool_response>"}
    return message


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(directory):
    rng = random.Random(SEED)
    seen = set()
    for name, count in SIZES.items():
        generator = ConversationGenerator(rng, "train" if name == "train" else "held out")
        conversations = []
        while len(conversations) < count:
            turns = generator.conversation()
            user_turns = " / ".join(turn["content"] for turn in turns if turn["role"] == "user")
            if user_turns not in seen:  # no duplicates within or across files
                seen.add(user_turns)
                conversations.append(turns)
        system = {"role": "system", "content": PERSONA}
        write(
            directory / f"{name}.jsonl",
            [{"messages": [system, *turns], "tools": TOOLS} for turns in conversations],
        )
        system = {"role": "system", "content": f"{PERSONA} {PLAIN_TOOLS}"}
        write(
            directory / "plain" / f"{name}.jsonl",
            [{"messages": [system, *map(plain, turns)]} for turns in conversations],
        )
    (directory / "system.txt").write_text(f"{PERSONA} {PLAIN_TOOLS}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
