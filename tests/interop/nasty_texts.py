"""Texts on which tokenizers disagree, by script and by kind of difficulty, and texts to train small tokenizers on."""

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
SCRIPTS = {
    "Latin": "na\u00efve \u00c5ngstr\u00f6m \u00c9COLE \u00fcber Stra\u00dfe \u0130stanbul Ti\u1ebfng Vi\u1ec7t "
    "\u0141\u00f3d\u017a d\u00e9j\u00e0 vu \u1e9e \ufb01n \u00aa\u00ba l'\u00e9t\u00e9",
    "Greek": "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1 \u03ba\u03cc\u03c3\u03bc\u03b5, "
    "\u1f08\u03c1\u03b9\u03c3\u03c4\u03bf\u03c4\u03ad\u03bb\u03b7\u03c2 \u1fb3 \u0391\u0392\u0393",
    "Cyrillic": "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0421\u0421\u0421\u0420 "
    "\u0451\u043b\u043a\u0430 \u041a\u0438\u0457\u0432 2024",
    "Arabic": "\u0627\u0644\u0639\u0631\u0628\u064a\u0629\u060c \u0645\u0631\u062d\u0628\u0627\u061f "
    "\u0661\u0662\u0663\u0664 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "Arabic with vowels": "\u0628\u0650\u0633\u0652\u0645\u0650 \u0627\u0644\u0644\u0651\u064e\u0647\u0650",
    "Hebrew": "\u05e2\u05d1\u05e8\u05d9\u05ea \u05e9\u05dc\u05d5\u05dd, \u05e6\u05d4\u05f4\u05dc",
    "Hebrew with vowels": "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd "
    "\u05d1\u05b0\u05bc\u05e8\u05b5\u05d0\u05e9\u05b4\u05c1\u05d9\u05ea",
    "Devanagari": "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 "
    "\u0928\u092e\u0938\u094d\u0924\u0947 "
    "\u0926\u0941\u0928\u093f\u092f\u093e\u0964 \u0967\u0968\u0969\u096a \u0915\u094d\u0937\u0947\u0924\u094d\u0930",
    "Bengali": "\u09ac\u09be\u0982\u09b2\u09be \u09ad\u09be\u09b7\u09be \u09a8\u09ae\u09b8\u09cd\u0995\u09be\u09b0",
    "Tamil": "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0bb5\u0ba3\u0b95\u0bcd\u0b95\u0bae\u0bcd",
    "Thai": "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 \u0e44\u0e17\u0e22 \u0e53\u0e54 "
    "\u0e19\u0e49\u0e33",
    "Khmer": "\u179f\u17bd\u179f\u17d2\u178f\u17b8 \u1796\u17b7\u1797\u1796\u179b\u17c4\u1780",
    "Han": "\u4e2d\u6587\uff0c\u5b57\u7b26\uff01\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\u7e41\u9ad4 "
    "2024\u5e743\u6708 "
    "\u3400\u4dbf \U00020000\U0002a6df \uff21\uff43\uff11\uff12",
    "Kana": "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u3072\u3089\u304c\u306a "
    "\u30ab\u30bf\u30ab\u30ca\u30fc\u30fb\uff76\uff80 \u300c\u306f\u3044\u300d",
    "Hangul": "\ud55c\uad6d\uc5b4 \uc548\ub155\ud558\uc138\uc694? \u1112\u1161\u11ab \u3131\u3134",
    "Georgian and others": "\u10e1\u10d0\u10e5\u10d0 \u1c90\u1c91\u10d0 \u0540\u0561\u0575\u0565\u0580\u0565\u0576 "
    "\u1208\u1233\u121b \u13a0\u13a1 \uab70",
    "emoji": "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd "
    "\u2764\ufe0f 1\ufe0f\u20e3 \u263a",
    "symbols": "\u201cquotes\u201d \u2026 \u2014 \u20ac5 \u00a31 \u2192 \u2211x \u00ad \ufffd \ue000 \u0378 \u200e "
    "\u2167 x\u00b2",
    "spaces": "\u00a0nbsp\u200bzero\u2003em\u3000wide\ufeffbom \x0b\x0c",
    "ASCII": ASCII,
    "ASCII digits": "a  1   22\n\n333 4444 55555  x1y22 -7 +8,9",
    "decomposed": "e\u0301cole a\u0308\u0323 n\u0303o z\u0334\u0352a\u0338lgo o\u031b\u0301 \u304b\u3099",
    "inner capitals": "CamelCase iPhone parseURLs HTMLElement",
    "inner capitals beyond ASCII": "\u043f\u0440\u0438\u0412\u0435\u0442 "
    "D\u00e9j\u00c0Vu \u03b1\u0392\u03b3 \u00e9COLE",
    "rare spaces": "a\u2028b x\u1680y next\u0085line\u2029",
    "numerals": "\u00bd\u00be\u00bc\u00b2 \u2460\u2461",
}
# Names of the differences that export.gguf.pretokenizer_table knows -> texts in which they show.
AFFECTED = {
    "marks": (
        *(
            "Arabic with vowels",
            "Hebrew with vowels",
            "Devanagari",
            "Bengali",
            "Tamil",
            "Thai",
            "Khmer",
            "decomposed",
        ),
        "emoji",
    ),
    "case": ("inner capitals", "inner capitals beyond ASCII", "ASCII"),
    "non-ASCII case": ("inner capitals beyond ASCII", "Latin"),
    "spaces": ("spaces", "rare spaces"),
    "numerals": ("numerals", "Arabic", "Devanagari", "Thai", "Han"),
    "digits": (
        "ASCII",
        "ASCII digits",
        "Cyrillic",
        "Han",
        "Arabic",
        "Devanagari",
        "Thai",
        "numerals",
        "symbols",
    ),
    "spaces before digits": ("ASCII digits",),
    "scripts": ("Georgian and others",),
}
# Rare words are repeated so that the vocabulary contains them.
TRAINING = [
    *[UNCASED + CASED, *SCRIPTS.values()] * 20,
    TEXT,
    Path(__file__).read_text("utf-8"),
    *Path(__file__).with_name("llama_cpp.py").read_text("utf-8").splitlines(),
]
