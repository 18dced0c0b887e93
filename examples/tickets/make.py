"""Generate the data of this example: messages to the support of a lamp shop, and how it answers them.

python examples/tickets/make.py [DIRECTORY]

Writes tickets.csv to DIRECTORY, by default the directory of this file: 160 rows with the columns message, category and
reply. The output is always the same.
"""

import csv
import random
import sys
from pathlib import Path

SEED = 20260718
ROWS = 160
NAMES = ["Ada", "Bela", "Carl", "Dina", "Emil", "Fay", "Greta", "Hugo", "Ines", "Jonas"]
NAMES += ["Kira", "Leo", "Mara", "Nils", "Olga", "Paul", "Quinn", "Rosa", "Sven", "Tilda"]
ITEMS = [
    "desk lamp",
    "floor lamp",
    "reading lamp",
    "wall lamp",
    "night light",
    "paper shade",
    "brass lantern",
    "garden lantern",
]
# Category -> what customers write, and the one reply of the shop.
TICKETS = {
    "delivery": (
        [
            "Where is my {item}? Order {order} should have come on {day}.",
            "Order {order} has not arrived. I was promised the {item} by {day}.",
            "Still no sign of the {item} I bought. The order number is {order}. It was due {day}!",
            "I have been waiting for order {order} since {day}. When do I get my {item}?",
        ],
        "Sorry about the wait, {name}. We ask the carrier about order {order} today and write to you tomorrow.",
    ),
    "damage": (
        [
            "The {item} from order {order} arrived broken.",
            "I unpacked my {item} on {day} and the glass is cracked. Order {order}.",
            "The {item} has a deep scratch and a bent foot. It is order {order}. What now?",
            "Order {order} came in a crushed box and the {item} inside is in pieces.",
        ],
        "Oh no, {name}! A new {item} leaves our shop today as order {order}. You may keep the old one.",
    ),
    "return": (
        [
            "I want to send the {item} back. It is too big for my table. Order {order}.",
            "Can I return the {item}? I bought two by mistake, order {order}.",
            "The {item} does not suit our hall. How do I return order {order}?",
            "Order {order}: the colour of the {item} is not what I hoped for. I would like my money back.",
        ],
        "No problem, {name}. Print the label in our mail and send order {order} back within 30 days.",
    ),
    "billing": (
        [
            "You charged my card twice for order {order}.",
            "The invoice of order {order} is wrong: I bought one {item} and paid for two.",
            "I was billed for order {order} on {day} although I cancelled it.",
            "My bank shows two payments for the {item}. Please check order {order}.",
        ],
        "Thank you for telling us, {name}. Our bookkeeper corrects order {order}, and the money is back in 3 days.",
    ),
    "spare parts": (
        [
            "The bulb of my {item} is dead. Which one fits? Order {order}.",
            "I lost the switch of the {item} from order {order}. Do you sell a new one?",
            "Our cat ate the cable of the {item}. Can I buy only the cable? It was order {order}.",
            "Do you have a new plug for the {item}? I got it on {day} with order {order}.",
        ],
        "Good news, {name}: we have parts for every {item}. A mail with the price for order {order} follows.",
    ),
}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
GREETINGS = ["", "", "Hello, ", "Hi there, ", "Dear team, ", "Good morning, "]
FAREWELLS = ["{name}", "{name}", "Thanks, {name}", "Regards, {name}", "Yours, {name}", "Please help! {name}"]


def ticket(rng, category):
    questions, reply = TICKETS[category]
    values = {
        "name": rng.choice(NAMES),
        "item": rng.choice(ITEMS),
        "order": rng.randrange(1000, 10000),
        "day": rng.choice(DAYS),
    }
    message = " ".join([rng.choice(GREETINGS) + rng.choice(questions), rng.choice(FAREWELLS)])
    return message.format(**values), category, reply.format(**values)


def main(directory):
    rng = random.Random(SEED)
    directory.mkdir(parents=True, exist_ok=True)
    rows = [ticket(rng, list(TICKETS)[index % len(TICKETS)]) for index in range(ROWS)]
    rng.shuffle(rows)
    with open(directory / "tickets.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["message", "category", "reply"])
        writer.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
