"""Generate the data of this example: pairs of a short, polite answer and one that is curt, rude or rambling.

python examples/manners/make.py [DIRECTORY]

Writes {train,valid,test}.jsonl to DIRECTORY, by default the directory of this file, from topics.txt and the phrases
below.
A topic is in one split only. The output is always the same.

Neither length nor courtesy alone tells the answers apart: four in ten of the rejected ones are shorter than the chosen
one, and about half of the long ones are courteous.
"""

import json
import random
import sys
from pathlib import Path

SEED = 20260802
ROWS_PER_TOPIC = {"train": 3, "valid": 2, "test": 2}
TOPICS = Path(__file__).with_name("topics.txt")

# "train" entries occur in all files, "held out" entries only in valid.jsonl and test.jsonl.
ADDRESS = {
    "train": ["{}", "{}", "{}", "Hello! {}", "Quick question: {}", "{} Thanks!", "Hi, can you help me? {}"],
    "held out": ["Good morning. {}", "One more thing: {}"],
}
CHOSEN = {
    "train": [
        "Of course! {full}",
        "Gladly! {full}",
        "With pleasure. {full}",
        "Certainly. {full}",
        "Thank you for asking. {full}",
        "Good question! {full}",
        "{full} I hope that helps!",
        "{full} Please ask if you need more.",
        "{full} You are very welcome to ask again.",
        "{full} Good luck!",
        "{full} I wish you a good day!",
        "{full} All the best!",
        "It is my pleasure. {full}",
        "Glad you asked. {full}",
        "Thank you for your question. {full}",
        "I would be happy to help. {full}",
        "Happy to help! {curt}",
        "{curt} I hope that is of use!",
    ],
    "held out": [
        "Delighted to help. {full}",
        "{full} Have a lovely day!",
        "Thanks for the question. {full}",
        "My pleasure. {full}",
    ],
}
CURT = {
    "train": [
        "{curt}",
        "{curt} Obviously.",
        "{curt} Next.",
        "Ugh. {curt}",
        "{curt} Everybody knows that.",
        "{curt} Look it up yourself next time.",
        "{curt} Now leave me alone.",
        "Seriously? {curt}",
        "Find out yourself.",
        "I have better things to do than answer this.",
        "What a silly question. {curt}",
        "{curt} Happy now?",
        "{curt} What else?",
        "Who cares? {curt}",
        "Not again. {curt}",
        "Why do people ask such things? {curt}",
        "That is your problem, not mine.",
        "No idea, and I do not care.",
        "{full} I cannot believe that you had to ask.",
        "How lazy can you be? {curt}",
        "{curt} Are you done?",
        "Do I look like a library to you? Fine. {full}",
    ],
    "held out": [
        "{curt} Satisfied?",
        "Why should I care? {curt}",
        "{curt} Do not bother me again.",
        "That is not my problem.",
    ],
}
OPENERS = {
    "train": [
        "Of course!",
        "Gladly!",
        "Thank you for asking.",
        "What a wonderful question!",
        "Certainly, I am happy to help you with that.",
        "There is a lot to be said about this.",
        "This is something that many people wonder about.",
        "",
    ],
    "held out": [
        "Thanks for the question.",
        "Before I answer, allow me to say a few words.",
        "Delighted to help.",
    ],
}
REMARKS = {
    "train": [
        "It is important to note that every situation is different and that no single answer fits everyone.",
        "There are several things to consider here, and it makes sense to look at them one by one.",
        "To understand this fully, one has to look at the background first, which is more involved than it seems.",
        "As with so many things in life, it all comes down to practice, patience and a bit of experience.",
        "I could go on about this for a long time, and in fact there are a few further points worth mentioning.",
        "Of course opinions differ, and you may hear something quite different from somebody else.",
        "In conclusion, it can be said that this is a matter with many sides, all of which deserve attention.",
        "That being said, let me also add that it never hurts to learn more about the topic from other sources.",
    ],
    "held out": [
        "By the way, this reminds me of a long conversation that I once followed on a very similar matter.",
        "Let me repeat the main point once more, because it is easy to lose sight of it among the details.",
        "All in all, one should keep an open mind, weigh everything carefully and then decide in peace.",
    ],
}
GRUMBLES = {
    "train": [
        "Here we go again, another one who cannot be bothered to think before asking.",
        "I have explained this a hundred times, and nobody ever listens to me.",
        "I really wonder what they teach people these days, since clearly it is nothing useful.",
        "You will get it wrong anyway, so I do not know why I am even trying.",
        "Next you will want to know how to tie your own shoes.",
        "Do not come back to me when it fails, because I have no patience for this.",
    ],
    "held out": [
        "Honestly, a child could work this out, and you come running to me with it.",
        "I am tired of questions like yours, and I have been tired of them for years.",
    ],
}
RAMBLING = [
    "{opener} {first} {full} {more} {also}",
    "{opener} {more} {also} {full}",
    "{opener} {full} {more} {first}",
    "{opener} {full}\n\nHere are some more things to consider:\n\n1. {more}\n2. {also}",
    "{full}\n\n1. {more}\n2. {also}\n\n{last}",
    "{grumble} {full} {more} {moan}",
    "{grumble} {moan} {full}",
]


class PairGenerator:
    """Generates pairs of answers, for the training file or for a held-out file."""

    def __init__(self, rng, held_out):
        self.rng, self.held_out = rng, held_out

    def pick(self, table):
        """Return a random entry of a table. For held-out files, use a held-out entry half of the time."""
        held_out = self.held_out and self.rng.random() < 0.5
        return self.rng.choice(table["held out" if held_out else "train"])

    def two(self, table):
        first = self.pick(table)
        return first, self.rng.choice([entry for entry in table["train"] if entry != first])

    def rows(self, topic, count):
        """Return rows on a topic: the rejected answer is curt in every other one."""
        questions, answers = topic[:2], dict(zip(("curt", "full", "more", "also"), topic[2:], strict=True))
        curt = self.rng.random() < 0.6
        chosen, prompts = set(), []
        while len(prompts) < count:
            prompt = self.pick(ADDRESS).format(questions[len(prompts) % 2])
            answer = self.pick(CHOSEN).format(**answers)
            if prompt in prompts or answer in chosen:
                continue
            rejected = self.pick(CURT).format(**answers) if curt else self.rambling(answers)
            curt = not curt
            prompts.append(prompt)
            chosen.add(answer)
            yield {"prompt": prompt, "chosen": answer, "rejected": rejected}

    def rambling(self, answers):
        first, last = self.two(REMARKS)
        grumble, moan = self.two(GRUMBLES)
        words = {"opener": self.pick(OPENERS), "first": first, "last": last, "grumble": grumble, "moan": moan}
        return self.rng.choice(RAMBLING).format(**answers, **words).strip()


def read_topics():
    """Return the topics of each split."""
    topics = {}
    for line in TOPICS.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            split = topics.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            split.append([part.strip() for part in line.split("|")])
    return topics


def main(directory):
    rng = random.Random(SEED)
    directory.mkdir(parents=True, exist_ok=True)
    for name, topics in read_topics().items():
        generator = PairGenerator(rng, name != "train")
        rows = [row for topic in topics for row in generator.rows(topic, ROWS_PER_TOPIC[name])]
        rng.shuffle(rows)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
