"""A metric for `nalora evaluate`: the share of an order slip's lines that are right.

nalora evaluate --model MODEL --adapter-path ADAPTERS --metric exact examples/bakery/slip.py:fields
"""


def fields(answer: str, expected: str) -> float:
    """Return the share of the expected lines, such as "NAME: Ruth", that the answer has."""
    wanted = expected.splitlines()
    found = set(answer.splitlines())
    return sum(line in found for line in wanted) / len(wanted)
