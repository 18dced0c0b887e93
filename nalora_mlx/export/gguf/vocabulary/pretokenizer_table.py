"""The pre-tokenizers of byte-level BPE that llama.cpp knows: their regular expressions, and how llama.cpp differs.

tests/interop/test_gguf_pretokenizers.py compares every row, and every difference, with llama.cpp.
"""

from dataclasses import dataclass
from typing import Any

from nalora_mlx.core.notices import Note

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_CASED = rf"{_LOWER}{_ENGLISH}?|{_UPPER}{_ENGLISH}?"
_KANA_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_MARKED = (  # a word or punctuation, with combining marks
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
# DeepSeek-LLM's list of the letters of the scripts with upper and lower case.
_CASED_SCRIPTS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
BYTE_LEVEL = "ByteLevel"  # stands for GPT-2's regex, which is built into the ByteLevel pre-tokenizer
DIGITS = r"\p{N}"
_THREE_DIGITS = r"\p{N}{1,3}"
LLAMA3 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
QWEN35 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = rf"{_LOWER}|{_UPPER}|\p{{N}}|{_REST_SLASH}"
GPT4O = rf"{_CASED}|\p{{N}}{{1,3}}|{_REST_SLASH}"
_KIMI_LETTERS = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
)
KIMI = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_KIMI_LETTERS[0]}*{_KIMI_LETTERS[1]}+{_ENGLISH}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_KIMI_LETTERS[0]}+{_KIMI_LETTERS[1]}*{_ENGLISH}?",
        _THREE_DIGITS,
        _REST,
    ]
)
_SEED = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|"
    "[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+|"
    f"[\u3105-\u312f]+|{_KANA_HAN}"
)

# How llama.cpp differs from the regular expressions: class of text -> note for the user.
DIFFERENCES = {
    "marks": (
        "llama.cpp cuts words at combining marks: vowel signs (Devanagari, Bengali, Tamil, Thai, Khmer ...), vowel "
        "points (Arabic, Hebrew) and accents that are separate characters; such text gets other tokens than in mlx-lm, "
        "in Devanagari about 1.6 times as many"
    ),
    "case": "llama.cpp does not cut words at inner capitals, as in CamelCase, so they get other tokens than in mlx-lm",
    "non-ASCII case": (
        "llama.cpp cuts words with capitals beyond A to Z differently (\u00c9COLE, \u043f\u0440\u0438\u0412\u0435"
        "\u0442), so they get other tokens than in mlx-lm"
    ),
    "spaces": Note("llama.cpp cuts words differently at spaces beyond ASCII, such as the ideographic space"),
    "numerals": Note("llama.cpp groups digits beside letters beyond ASCII, and fractions, differently"),
    "spaces before digits": Note("llama.cpp cuts several spaces before a digit differently"),
    "scripts": Note("llama.cpp cuts a few rare scripts (Cherokee, Yi) differently"),
    "digits": "llama.cpp joins digits that mlx-lm separates",
}


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer that llama.cpp knows."""

    name: str  # in llama.cpp
    patterns: tuple[str, ...]  # applied one after another
    ignore_merges: bool = False  # keep a word whole if it is a token
    differs: tuple[str, ...] = ()  # keys of DIFFERENCES
    # Another name in llama.cpp that differs less but that only recent versions know.
    closer: tuple[str, tuple[str, ...]] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the pre_tokenizer of a tokenizer.json."""
        steps: list[dict[str, Any]] = []
        for pattern in self.patterns:
            if pattern == BYTE_LEVEL:
                steps.append(_byte_level(True))
            else:
                split = {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                }
                steps.append(split)
        if BYTE_LEVEL not in self.patterns:
            steps.append(_byte_level(False))
        return {"type": "Sequence", "pretokenizers": steps}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": BYTE_LEVEL, "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (BYTE_LEVEL,)),  # also olmo, exaone4, gpt_neox
    PreTokenizer("smollm", (DIGITS, BYTE_LEVEL)),  # also starcoder, granite, cohere, exaone
    PreTokenizer("llama-bpe", (LLAMA3,), ignore_merges=True),  # also lfm2, falcon_h1
    PreTokenizer("dbrx", (LLAMA3,)),  # also glm4, olmo2, olmo3, phi-4, granite 4
    PreTokenizer("qwen2", (QWEN2,)),  # also hunyuan, bailing_moe, stablelm 2
    PreTokenizer("qwen35", (QWEN35,)),
    PreTokenizer("tekken", (TEKKEN,), ignore_merges=True, differs=("marks", "non-ASCII case")),
    PreTokenizer(  # o200k: gpt_oss, llama4, phi-4-mini, minimax
        "gpt-4o",
        (GPT4O,),
        differs=("marks", "non-ASCII case"),
        closer=("granite-embed-multi-97m", ("non-ASCII case",)),
    ),
    PreTokenizer("kimi-k2", (KIMI,), differs=("marks", "case")),
    PreTokenizer(  # also hunyuan_v1_dense
        "deepseek-v3", (_THREE_DIGITS, _KANA_HAN, rf"{_MARKED}[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    ),
    PreTokenizer(  # also deepseek_v2
        "deepseek-llm",
        (
            "[\r\n]",
            rf"\s?[{_CASED_SCRIPTS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
            DIGITS,
        ),
        differs=("digits", "spaces"),
    ),
    PreTokenizer(
        "deepseek-coder",
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", DIGITS),
        differs=("spaces",),
    ),
    PreTokenizer("seed-coder", (_SEED,)),
    PreTokenizer("exaone-moe", (_EXAONE_MOE,)),
    PreTokenizer("laguna", (r"[^\n]+|[\n]+", QWEN2)),
    PreTokenizer(
        "youtu", (_YOUTU_SCRIPTS, rf"{_CASED}|\p{{N}}|{_REST_SLASH}"), ignore_merges=True, differs=("case",)
    ),
    PreTokenizer(
        "tiny_aya", (r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O), differs=("case", "numerals", "spaces before digits")
    ),
    PreTokenizer(
        "afmoe",
        (
            r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
            _ASIAN,
            rf"{_MARKED}[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        differs=("scripts", "spaces before digits"),
    ),
    PreTokenizer("minicpm5", (_THREE_DIGITS, LLAMA3.replace(_THREE_DIGITS, r"\p{N}+")), ignore_merges=True),
    PreTokenizer("spark2_5", (_THREE_DIGITS, _KANA_HAN, rf"{_MARKED}|[\r\n]|\s+(?!\S)|\s+", DIGITS)),
)
# Other names of llama.cpp for the same splits.
ALIASES = {
    "gpt-2": {"exaone4", "mpt", "olmo", "phi-2"},
    "smollm": {"starcoder", "refact", "command-r", "exaone"},
    "llama-bpe": {"llama3", "lfm2", "falcon3", "falcon-h1"},
    "dbrx": {"chatglm-bpe", "glm4", "smaug-bpe"},
    "qwen2": {
        "bailingmoe",
        "bailingmoe2",
        "deepseek-r1-qwen",
        "grok-2",
        "hunyuan",
        "solar-open",
        "stablelm2",
    },
    "gpt-4o": {"kanana2", "llama4", "minimax-m2", "talkie"},
    "deepseek-v3": {"hunyuan-dense", "joyai-llm"},
}
# Names accepted from `gguf_tokenizer_pre`, which models converted from GGUF have.
KNOWN_NAMES = {"falcon"}.union((row.name for row in PRE_TOKENIZERS), *ALIASES.values())
