"""What each rule of a spec matched, and on which model, so that a later plan can be held to it."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fx.plan.blueprint import Blueprint
from lora_fx.plan.folding import fold, unfold
from lora_fx.plan.selectors import Selection
from lora_fx.spec.spec import Spec

if TYPE_CHECKING:
    from lora_fx.plan.plan import Plan
    from lora_fx.plan.rules import AdapterPlan

_FORM = 1
_NOT_IDENTITY = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class Rule:
    """A statement as written, of an adapter or of none; `occurrence` counts those written alike."""

    adapter: str
    text: str
    occurrence: int = 0


@dataclass(frozen=True)
class Lock:
    """Hashes of the spec's `files`, the identity of the `model`, the names that each rule matched.

    `ranks` are those of the sites of each adapter, by name.
    """

    language: int
    files: Mapping[str, str]
    model: Mapping[str, str]
    matches: Mapping[Rule, frozenset[str]]
    ranks: Mapping[str, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        """Return the lock as plain data, names folded, rules in their order."""
        return {
            "lock": _FORM,
            "language": self.language,
            "files": dict(self.files),
            "model": dict(self.model),
            "quantize": self._rules(""),
            "adapters": {
                adapter: {"rules": self._rules(adapter), "ranks": _folded(ranks)}
                for adapter, ranks in self.ranks.items()
            },
        }

    def _rules(self, adapter: str) -> list[dict[str, Any]]:
        return [
            {"rule": rule.text, "matches": sorted(str(one) for one in fold(in_order(names)))}
            for rule, names in self.matches.items()
            if rule.adapter == adapter
        ]


def from_json(data: Any) -> Lock:
    """Read plain data; raises ValueError, KeyError, TypeError or AttributeError for any other."""
    if data["lock"] != _FORM:
        raise ValueError(f"it has form {data['lock']!r}, and this version reads form {_FORM}")
    adapters = data["adapters"]
    rules = {"": data["quantize"]} | {name: one["rules"] for name, one in adapters.items()}
    return Lock(
        data["language"],
        dict(data["files"]),
        dict(data["model"]),
        {
            rule: frozenset(name for text in matches for name in unfold(text))
            for adapter, some in rules.items()
            for rule, matches in _counted(adapter, ((r["rule"], r["matches"]) for r in some))
        },
        {
            name: {site: rank for text, rank in one["ranks"].items() for site in unfold(text)}
            for name, one in adapters.items()
        },
    )


def lock_of(plan: "Plan") -> Lock:
    """Return the lock of a plan."""
    return Lock(
        plan.spec.syntax.header.version,
        _hashes(plan.spec),
        identity_of(plan.blueprint),
        {rule: frozenset(selection.names) for rule, selection in rules_of(plan)},
        {a.name: _ranks(a) for a in plan.adapters},
    )


def rules_of(plan: "Plan") -> Iterator[tuple[Rule, Selection]]:
    """Yield every statement that selects something, with what it selects."""
    yield from _counted("", ((s.text, s) for s in plan.selections))
    for adapter in plan.adapters:
        yield from _counted(adapter.name, ((s.text, s) for s in adapter.selections))


def _counted(adapter: str, texts: Iterable[tuple[str, Any]]) -> Iterator[tuple[Rule, Any]]:
    seen: Counter[str] = Counter()
    for text, value in texts:
        yield Rule(adapter, text, seen[text]), value
        seen[text] += 1


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names, numbers in them by size."""
    return sorted(names, key=lambda name: [(p.isdecimal() and int(p), p) for p in name.split(".")])


def _ranks(adapter: "AdapterPlan") -> dict[str, int]:
    """Return the ranks that the spec says: those of `eva` depend on data."""
    return {site.name: site.rank for site in adapter.sites if site.init.name != "eva"}


def _folded(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return ranks by folded name: names are folded only with others of the same rank."""
    alike: dict[int, list[str]] = {}
    for name in in_order(ranks):
        alike.setdefault(ranks[name], []).append(name)
    return {str(one): rank for rank, names in alike.items() for one in fold(names)}


def _hashes(spec: Spec) -> dict[str, str]:
    """Return a hash of the spec's text and of each text it includes, by path from its folder."""
    folder = spec.path.parent if spec.path else Path()
    sources = {spec.source, *(statement.span.source for statement in spec.syntax.statements)}
    return {
        Path(os.path.relpath(source.name, folder)).as_posix(): _hash(source.text)
        for source in sources
    }


def identity_of(blueprint: Blueprint | None) -> dict[str, str]:
    """Return a model's class, and a hash of what its config says of its modules."""
    if blueprint is None:
        return {}
    config = json.dumps(_described(blueprint.config.to_dict()), sort_keys=True, default=str)
    return {"class": blueprint.model.__name__, "config": _hash(config)}


def _described(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {str(k): _described(v) for k, v in config.items() if k not in _NOT_IDENTITY}


def _hash(text: str) -> str:
    return f"sha256:{sha256(text.encode()).hexdigest()}"
