"""The number that an answer ends up with."""

import math
import re
import unicodedata

# Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese characters.
SPACELESS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
# A digit or sign after a letter belongs to a name: CO2, x_1, covid-19. Not so in scripts without spaces, nor in Korean,
# which writes numbers next to words.
_JOINED = rf"[^\W{SPACELESS}\uac00-\ud7a3]"
_GROUP = r"[1-9]\d{0,2}"
_NUMBER = re.compile(
    rf"""
    (?P<sign> (?<!{_JOINED}) (?<![)\]}}]) [+-] )?
    (?: \\? [$€£¥₹₩₽₺₫] \s? (?P<late_sign> - )? )?
    (?<!{_JOINED}) (?<!\d\.)
    (?:
        (?: (?P<whole> \d+ ) \s )? (?P<over> \d+ ) / (?P<under> [1-9]\d* )
    |
        (?: (?P<integer>
                {_GROUP} (?: ,\d{{2,3}} )* ,\d{{3}} (?!\d)  # 1,234,567, or 12,34,567 in India
            |   {_GROUP} (?: [ \xa0\u2009\u202f'\u2019_] \d{{3}} )+ (?!\d)
            |   {_GROUP} (?: \.\d{{3}} )+ (?: (?=,\d) | (?<=\.\d{{3}}\.\d{{3}}) (?!\d) )  # 1.234,5 or 1.234.567
            |   \d+
            )
            (?: [.,] (?P<decimals> \d+ ) )?
        |
            \. (?P<only_decimals> \d+ )
        )
        (?:
            [eE] (?P<exponent> [+-]?\d{{1,4}} ) (?!\w)
        |   \s? (?: [xX\xd7*·] | \\times | \\cdot ) \s? 10 (?: \^ | \*\* ) \{{? (?P<power_of_ten> [+-]?\d{{1,4}} )
        |   (?: \^ | \*\* ) \{{? (?P<power> [+-]?\d{{1,4}} )
        )?
    )
    """,
    re.VERBOSE,
)
_MARKED = (  # where the result stands
    re.compile(
        rf"\#{{4}}\s*(?P<result>(?>{_NUMBER.pattern}))(?![.)]\s*[^\W\d])", re.VERBOSE
    ),  # not "#### 2. Then"
    re.compile(r"\\boxed\s*\{(?P<result>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"),
)
_FRACTION = re.compile(r"(-?)\s*\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_SMALL_FRACTION = re.compile("[¼-¾⅐-⅞]")
_RAISED = re.compile(r"(?<=\d)[⁺⁻]?[⁰¹²³⁴-⁹]+")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\^(?:\{[+-]?\d+\}|[+-]?\d+)")  # cm^2, \text{m}^{2}
_THIN_SPACE = re.compile(r",\\!|\{,\}|\\,")  # in LaTeX, between groups of digits
# Minus sign, en dash and small hyphen-minus; Arabic decimal and thousands separators.
_SIGNS = {"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\u066b": ".", "\u066c": ","}


class _Digits(dict[int, str]):
    """A table for `str.translate` that writes digits of every script, and minus signs, in ASCII."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if (digit := unicodedata.decimal(character, None)) is not None:
            character = str(digit)
        elif "\uff00" < character < "\uff65":
            character = unicodedata.normalize("NFKC", character)
        self[code] = character = _SIGNS.get(character, character)
        return character


_ASCII_DIGITS = _Digits()


def last_number(text: str) -> float | None:
    """Return the number that a text ends up with, None if it has none.

    It is the last one after "####" (as in GSM8K) or in \\boxed{}, or else in the whole text. A comma before three
    digits separates thousands, any other comma between digits is a decimal one, and so is a point, unless several
    separate groups of three digits. Fractions and powers are computed. Percent and currency signs are ignored.
    """
    text = _plain_numbers(text)
    marked = [found[-1]["result"] for pattern in _MARKED if (found := [*pattern.finditer(text)])]
    for part in (*marked, text):
        values = [value for match in _NUMBER.finditer(part) if (value := _value(match)) is not None]
        if values:
            return values[-1]
    return None


def _plain_numbers(text: str) -> str:
    """Return a text whose numbers are written as `_NUMBER` reads them."""
    text = _SMALL_FRACTION.sub(
        lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("\u2044", "/"), text
    )
    text = _RAISED.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]).replace("\u2212", "-"), text)
    text = _FRACTION.sub(r" \1\2/\3", text.translate(_ASCII_DIGITS))
    return _UNIT_POWER.sub("", _THIN_SPACE.sub(",", text)).strip()


def _value(match: re.Match[str]) -> float | None:
    """Return the value of a match of `_NUMBER`, None if it is too large."""
    sign = -1 if "-" in (match["sign"], match["late_sign"]) else 1
    try:
        if match["over"]:
            return sign * (int(match["whole"] or 0) + int(match["over"]) / int(match["under"]))
        integer = re.sub(r"\D", "", match["integer"] or "0")
        decimals = match["decimals"] or match["only_decimals"] or "0"
        value = float(f"{integer}.{decimals}e{match['exponent'] or match['power_of_ten'] or 0}")
        value = sign * value ** int(match["power"] or 1)
    except (ArithmeticError, ValueError):
        return None
    return value if math.isfinite(value) else None


def is_number(text: str) -> bool:
    """Return whether a text is a number and nothing else, but for a percent or currency sign."""
    plain = _plain_numbers(text).rstrip(" %$€£¥₹₩₽₺₫")
    return (match := _NUMBER.fullmatch(plain)) is not None and _value(match) is not None
