"""What the rows of a split were understood as, and which of their parts nothing reads."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from nalora_mlx.core.errors import MAX_SHOWN
from nalora_mlx.core.notices import Note
from nalora_mlx.core.parsing import did_you_mean
from nalora_mlx.data.rows.cells import is_blank
from nalora_mlx.data.rows.forms import KEY_FLAGS, Form
from nalora_mlx.data.rows.preferences import LABEL

ROW_KEYS = ("system", "tools", "images", "weight", "chat_template_kwargs")  # that rows of every form may have


class Survey:
    """Counts over the rows of one split. `parse_rows` fills it, and `notices` turns it into sentences."""

    def __init__(self) -> None:
        self.forms: Counter[str] = Counter()
        self._parts: dict[str, dict[str, str]] = {}  # of each form that is not plain, the keys that rows have
        self._named = False
        self._keys = _Places()
        self._message_keys = _Places()
        self._systems = _Places()
        self._weights = _Places()

    def add(self, form: Form, content: Mapping[str, Any]) -> None:
        """Count a row."""
        self.forms[form.name] += 1
        if not form.named_by:
            parts = self._parts.setdefault(form.name, {})
            parts |= {key: part for key, part in form.parts.items() if not is_blank(content.get(key))}

    def add_unread(
        self, source: str, keys: Iterable[str], message_keys: Iterable[str], system: bool, named: bool
    ) -> None:
        """Record what nothing reads in a row: keys of it, keys of its messages, a system prompt.

        `named` is whether the settings name the keys to read.
        """
        self._named |= named
        self._keys.add(source, keys)
        self._message_keys.add(source, message_keys)
        self._systems.add(source, ["system"] if system else [])

    def add_weight(self, source: str, weight: int) -> None:
        """Record how often a row counts."""
        self._weights.add(source, ["weight"] if weight > 1 else [])

    def notices(self, name: str) -> list[str]:
        """Return sentences about a split; none if all rows have a form of mlx_lm.lora and nothing else."""
        found: list[str] = []
        if self._parts:
            forms = "; ".join(map(self._clause, self.forms))
            only_pairs = self._parts.keys() == {"preferences"}
            others = "--prompt-key reads another prompt" if only_pairs else f"{KEY_FLAGS} read other keys"
            found.append(Note(f"{name}: {forms}; {others}"))
        if self._keys and self._named:
            found.append(
                Note(f"{name}: nothing reads the keys {self._keys}")
            )  # the user has said which to read
        elif self._keys:
            meant = next(filter(None, (did_you_mean(key, ROW_KEYS) for key in self._keys)), "")
            if LABEL in self._keys and self.forms.keys() - {"text", "preferences"}:
                meant = f"; --train-mode kto learns from {LABEL!r} if it is true or false"
            remedy = meant or "; remove them, or rename them if they matter"
            found.append(f"{name}: nothing reads the keys {self._keys}{remedy}")
        if self._message_keys:
            found.append(
                f"{name}: no known chat template reads the keys {self._message_keys} of messages; "
                "remove them, or rename them if they matter"
            )
        if self._systems:
            found.append(
                f"{name}: 'system' is not read where the chat has a system message ({self._systems.where('system')}); "
                "remove one of the two"
            )
        if self._weights:
            found.append(
                Note(
                    f"{name}: 'weight' is above 1 ({self._weights.where('weight')}); "
                    "an epoch holds these rows several times"
                )
            )
        return found

    def _clause(self, form: str) -> str:
        """Return how many rows were read as a form, and which keys became what."""
        count = self.forms[form]
        clause = f"{count:,} {'row' if count == 1 else 'rows'} read as {form}"
        keys: dict[str, list[str]] = {}
        for key, part in self._parts.get(form, {}).items():
            keys.setdefault(part, []).append(repr(key))
        became = ", ".join(f"{' and '.join(names)} -> {part}" for part, names in keys.items())
        return f"{clause}: {became}" if became else clause


class _Places:
    """For each key, the number of rows that have it, and the first of them."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, source: str, keys: Iterable[str]) -> None:
        for key in keys:
            count, first = self._found.get(key, (0, source))
            self._found[key] = count + 1, first

    def __bool__(self) -> bool:
        return bool(self._found)

    def __iter__(self) -> Any:
        return iter(self._found)

    def where(self, key: str) -> str:
        count, first = self._found[key]
        return f"{count:,} {'row' if count == 1 else 'rows'}, {first}"

    def __str__(self) -> str:
        """Return the keys with their places; keys of the same rows share one."""
        keys: dict[str, list[str]] = {}
        for key in list(self._found)[:MAX_SHOWN]:
            keys.setdefault(self.where(key), []).append(repr(key))
        rest = len(self._found) - MAX_SHOWN
        more = f" and {rest} more" if rest > 0 else ""
        return ", ".join(f"{', '.join(names)} ({where})" for where, names in keys.items()) + more
