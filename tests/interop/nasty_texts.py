"""A text on which tokenizers disagree, and texts to train small tokenizers on."""

from pathlib import Path

ASCII = (
    "Hello  world,   three    spaces\tand\t\ttabs \n\n\n  lines \r\n\r\n end   \n"
    "I'm, you're, he'll, she'd, we've, it's DON'T CAN'T I'LL 'tis rock'n'roll  'quoted'\n"
    "0 12 345 6789 1234567890 3.14159 1,000,000 0x1F 1e-5 v2.0.1 2024-01-31\n"
    "```python\ndef f(x: int) -> dict:\n\treturn {'a': [x, x**2], \"b\": not x}  # !?...\n```\n"
    "https://example.org/a?b=c&d=%20#e <tag attr='1'/> a_b-c CamelCase snake_case SHOUT xXx\n"
    "!!! ??? ... --- === /// \\\\ @#$%^&*() ~`|;:\n"
)
UNCASED = (
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u4e2d\u6587\uff0c\u5b57\u7b26\uff01 \ud55c\uad6d\uc5b4 "
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea "
    "\u0e44\u0e17\u0e22 "
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd "
    "\u00bd \u00b2 \u2167 \u0664\u0665\u0666 \u2460 \u201cquotes\u201d \u2026 \u2014 \u20ac\u00a3\u00a5 \u2192 \u2211\n"
    "\u00a0nbsp\u200bzero\u2003em\u3000wide\ufeffbom \u2028line\u0085next\n"
)
# Non-ASCII upper and lower case and combining marks, not normalized.
CASED = (
    "na\u00efve \u00c5ngstr\u00f6m \u00c9COLE \u00fcber Stra\u00dfe \u0130stanbul \u041f\u0440\u0438\u0432\u0435\u0442 "
    "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1 \u017f \u00df\u1e9e \ufb01\n"
    "e\u0301 a\u0308\u0323 n\u0303o z\u0334\u0352a\u0338lgo \u0939\u093f\u0928\u094d\u0926\u0940\n"
)
TEXT = ASCII + UNCASED + CASED
# Rare words are repeated so that the vocabulary contains them.
TRAINING = [
    *[UNCASED + CASED] * 20,
    TEXT,
    Path(__file__).read_text("utf-8"),
    *Path(__file__).with_name("llama_cpp.py").read_text("utf-8").splitlines(),
]
