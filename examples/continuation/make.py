"""Generate the data of this example: logbook entries of a lighthouse.

python examples/continuation/make.py [DIRECTORY]

Writes {train,valid,test}.jsonl to DIRECTORY, by default the directory of this file. Each `text` row has the entries of
two days. The output is always the same.
"""

import json
import random
import sys
from pathlib import Path

SEED = 20260702
SIZES = {"train": 260, "valid": 40, "test": 40}

# Month -> days, and the time at which the lamp is lit (plus or minus ten minutes).
MONTHS = {
    "January": (31, "16:40"),
    "February": (28, "17:30"),
    "March": (31, "18:20"),
    "April": (30, "19:20"),
    "May": (31, "20:10"),
    "June": (30, "20:40"),
    "July": (31, "20:30"),
    "August": (31, "19:50"),
    "September": (30, "18:40"),
    "October": (31, "17:40"),
    "November": (30, "16:50"),
    "December": (31, "16:20"),
}
QUARTERS = ["north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"]
# State of the sea by wind force.
SEAS = [
    "calm",
    "calm",
    "smooth",
    "slight",
    "moderate",
    "rough",
    "rough",
    "very rough",
    "high",
    "high",
    "wild",
]

SIGHTINGS = {
    "fair": [
        "Two trawlers at anchor in the lee",
        "A white yacht passed close and waved",
        "Porpoises off the landing at noon",
        "The mail boat came with letters and lamp oil",
        "A steamer hull down to the west",
        "Seals on the low rocks all morning",
        "Terns fishing in the channel",
        "A boy in a skiff lost an oar and was lent ours",
        "Three lobster boats at work under the cliff",
        "A survey ship sounding the bank",
        "Swallows resting on the rail",
        "Gannets diving by the dozen",
    ],
    "foul": [
        "A brig running for harbour under bare poles",
        "Spray over the gallery",
        "A drifter signalled for a pilot",
        "No boat could land",
        "Timber in the water, no ship to be seen",
        "A coaster hove to until noon",
        "Four dead birds under the lantern",
        "The lower steps are under water",
        "A red flare to the south, seen once",
        "The mail boat turned back",
    ],
    "fog": [
        "Heard a bell to the east and answered it",
        "Cannot see the landing",
        "A steamer passed unseen, close by her sound",
        "Nothing seen all day",
        "Oars heard under the cliff, hailed them off the reef",
        "A lost pigeon came in at the kitchen window",
    ],
}
CHORES = [
    "Oiled the clockwork",
    "Polished the lens",
    "Whitewashed the store",
    "Trimmed both wicks",
    "Mended the hen house",
    "Scraped rust from the rail",
    "Counted the oil: enough for {weeks} weeks",
    "Wrote to the Commissioners about the pump",
    "Planted potatoes behind the wall",
    "Caulked the skiff",
    "Tarred the ropes of the hoist",
    "Cleaned the flue",
    "Wound the clock and set it by the noon gun",
    "Painted the door green",
    "Baked, and burnt the second loaf",
    "Patched the oilskins",
    "Taught the assistant the flag code",
    "Salted {fish} mackerel",
]


class Weather:
    """The air pressure (glass), wind and fog of a day."""

    def __init__(self, rng):
        self.rng = rng
        self.glass = rng.randrange(984, 1032)
        self.quarter = rng.randrange(8)
        self.change = 0
        self.next_day()

    def next_day(self):
        self.change = self.rng.choice([-14, -9, -5, 0, 4, 8, 12])
        self.glass = min(max(self.glass + self.change, 972), 1038)
        self.quarter = (self.quarter + self.rng.choice([-1, 0, 0, 1])) % 8
        # Low pressure brings strong wind, and rapidly falling pressure more.
        self.force = min(max(round((1032 - self.glass) / 7) + (self.change < -6), 0), 10)
        self.fog = self.force <= 2 and self.rng.random() < 0.4

    @property
    def tendency(self):
        return "falling" if self.change < 0 else "rising" if self.change > 0 else "steady"

    @property
    def kind(self):
        return "fog" if self.fog else "foul" if self.force >= 6 else "fair"


def lamp_time(rng, month):
    hours, minutes = map(int, MONTHS[month][1].split(":"))
    total_minutes = 60 * hours + minutes + 5 * rng.randrange(-2, 3)
    return f"{total_minutes // 60:02d}:{total_minutes % 60:02d}"


def entry(rng, day, month, weather):
    wind = f"Wind {QUARTERS[weather.quarter]}, force {weather.force}." if weather.force else "No wind."
    chore = rng.choice(CHORES).format(weeks=rng.randrange(3, 15), fish=rng.randrange(6, 40))
    sentences = [
        f"{day} {month}.",
        f"Glass {weather.glass}, {weather.tendency}.",
        wind,
        f"Sea {SEAS[weather.force]}.",
        *(["Fog, horn sounded."] if weather.fog else []),
        f"{rng.choice(SIGHTINGS[weather.kind])}.",
        f"{chore}.",
        f"Lamp lit {lamp_time(rng, month)}.",
    ]
    return " ".join(sentences)


def main(directory):
    rng = random.Random(SEED)
    directory.mkdir(parents=True, exist_ok=True)
    dates = [(day, month) for month, (days, _) in MONTHS.items() for day in range(1, days)]
    rng.shuffle(dates)  # each row gets its own date, so no date occurs in two files
    for name, count in SIZES.items():
        rows = []
        for day, month in [dates.pop() for _ in range(count)]:
            weather = Weather(rng)
            first = entry(rng, day, month, weather)
            weather.next_day()
            rows.append({"text": f"Log of Tern Rock Light. {first}\n{entry(rng, day + 1, month, weather)}"})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
