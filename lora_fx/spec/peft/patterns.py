"""PEFT's ways of naming modules, each as a pattern of the language."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lora_fx.spec.expressions import quote

_KEYWORDS = ("class", "regex", "linear", "parameter")


@dataclass(frozen=True)
class Pattern:
    """Names of modules, or with `parameter` of parameters.

    `ending`: the name itself, or what ends with a dot and it. `exact`: only the name itself.
    `tail`: what ends with the text, dot or not. `regex`: a full match. `linear`: PEFT's
    `all-linear`.
    """

    kind: Literal["ending", "exact", "tail", "regex", "linear"]
    text: str = ""
    parameter: bool = False

    def __str__(self) -> str:
        if self.kind == "linear":
            return "linear"
        if self.kind == "ending" and not self.parameter and _is_word(self.text):
            return self.text
        if self.kind == "regex" or not _is_plain(self.text):
            return f"regex {quote(self._as_regex())}"
        glob = {"exact": "", "ending": "**.", "tail": "**.*"}[self.kind] + self.text
        return f"parameter {quote(glob)}" if self.parameter else quote(glob)

    def _as_regex(self) -> str:
        if self.kind == "regex":
            return self.text
        before = {"exact": "", "ending": r"(.*\.)?", "tail": ".*"}[self.kind]
        return before + re.escape(self.text)

    def ending_with(self, name: str) -> "Pattern | None":
        """Return what of this ends with a dotted name, as a pattern; None if nothing does.

        Only for `ending` and `exact`.
        """
        if _ends(self.text, name):
            return self
        if self.kind == "ending" and _ends(name, self.text):
            return Pattern("ending", name, self.parameter)
        return None


def dotted_name(pattern: str) -> str | None:
    """Return the name that a regex of PEFT's is meant as, None if it is more than one.

    A bare dot is taken for a dot, although the regex lets it be any character.
    """
    name = re.sub(r"\\\.", ".", pattern)
    return name if re.fullmatch(r"\w+(\.\w+)*", name) else None


def not_fitting(key: str) -> Pattern:
    """Return the names that a key of `rank_pattern` or `alpha_pattern` is not about."""
    return Pattern("regex", rf"(?!(.*\.)?({key})$).*")


def folded(patterns: Iterable[Pattern]) -> tuple[Pattern, ...]:
    """Return the patterns, each once; those that differ in one number become one."""
    families: dict[Pattern, list[str]] = {}
    for pattern in patterns:
        before, number, after = _at_first_number(pattern)
        family = families.setdefault(replace(pattern, text=f"{before}\0{after}"), [])
        if number not in family:
            family.append(number)
    return tuple(
        replace(family, text=family.text.replace("\0", _either(numbers)))
        for family, numbers in families.items()
    )


def ranges(indices: Sequence[int]) -> str:
    """Write layer indices as half-open ranges: `0..4, 7`."""
    parts: list[list[int]] = []
    for index in sorted(set(indices)):
        if parts and index == parts[-1][1]:
            parts[-1][1] = index + 1
        else:
            parts.append([index, index + 1])
    return ", ".join(str(a) if b == a + 1 else f"{a}..{b}" for a, b in parts)


def _at_first_number(pattern: Pattern) -> tuple[str, str, str]:
    text = pattern.text
    of_names = pattern.kind in ("exact", "ending") and _is_plain(text)
    found = re.search(r"(?:^|(?<=\.))\d+(?=\.|$)", text) if of_names else None
    return (text[: found.start()], found[0], text[found.end() :]) if found else (text, "", "")


def _either(numbers: Sequence[str]) -> str:
    return numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}"


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _is_word(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*", text, re.ASCII) is not None and text not in _KEYWORDS


def _is_plain(text: str) -> bool:
    """Whether no character of a name means something in a glob, but for what `folded` wrote."""
    return re.fullmatch(r"[^*{},]*(\{[\d,]+\}[^*{},]*)?", text) is not None
