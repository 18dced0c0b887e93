"""Small tokenizers, trained in a second, with the special tokens of all chat templates of templates/."""

import functools
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.chat_cases import CHATS
from tests.data.chat_oracle import FORMATS, Format

TEMPLATES = Path(__file__).parent / "templates"
# Real tokenizers are too large for the repository; where they lie beside it, they are tested as well.
REAL = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"

SPECIAL_TOKENS = (TEMPLATES / "special_tokens.txt").read_text().split()


@functools.cache
def trained(kind: str) -> Tokenizer:
    """Train a tokenizer.

    Args:
        kind: "bytes" for a byte-level BPE; "stripping" for one whose special tokens absorb the white space after them,
            as Phi-3's do; "always" or "first" for one whose words begin with "▁", as those of SentencePiece, with a
            blank added to each text between special tokens, or to the first one.
    """
    tokenizer = Tokenizer(models.BPE())
    alphabet = []
    if kind in ("bytes", "stripping"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=kind == "always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=kind, split=kind == "always")
    texts = [str(message) for chat in CHATS.values() for message in chat.messages]
    texts += [message["content"] for chat in CHATS.values() for message in chat.messages]
    texts += [path.read_text() for path in sorted(TEMPLATES.glob("*.jinja"))]
    texts += [bytes(range(32, 127)).decode() + "\t"]
    special = [AddedToken(token, normalized=False, rstrip=kind == "stripping") for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def small_tokenizer(name: str, kind: str = "bytes", template: str | None = None) -> TokenizerWrapper:
    """Return the tokenizer of a format, with its chat template."""
    form: type[Format] = FORMATS[name]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=trained(kind),
        bos_token=form.bos or None,
        eos_token=form.ends[-1],
        additional_special_tokens=[],
        chat_template=template or (TEMPLATES / f"{name}.jinja").read_text(),
        clean_up_tokenization_spaces=False,
    )
    if form.bos:  # added to texts by default, but not to rendered chats
        first = (form.bos, fast.convert_tokens_to_ids(form.bos))
        fast._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{form.bos} $A", special_tokens=[first]
        )
    return TokenizerWrapper(fast, eos_token_ids=[fast.convert_tokens_to_ids(end) for end in form.ends])
