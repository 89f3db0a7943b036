"""What a plan matches otherwise than the lock beside its spec says."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.plan.folding import fold
from lora_fx.plan.lock import Lock, Rule, in_order, lock_of, rules_of
from lora_fx.plan.lock_file import read_lock

if TYPE_CHECKING:
    from lora_fx.plan.plan import Plan

_MOST_NAMES = 8


def lock_differences(plan: "Plan") -> list[Diagnostic]:
    """Return a warning for each rule, and each adapter's ranks, that differ from the lock.

    The first says what else has changed. Without a lock there are none; one that cannot be read is
    a warning too.
    """
    try:
        old = read_lock(plan.spec)
    except LoraFxError as error:
        return list(error.diagnostics)
    if old is None:
        return []
    new = lock_of(plan)
    places = {rule: selection.statement.span for rule, selection in rules_of(plan)}
    found = [*_rules(old, new, places), *_ranks(old, new, plan)]
    if found:
        help = f"if that is meant: `lora-fx plan {plan.spec.source.name} --lock`"
        found[0] = replace(found[0], notes=(*found[0].notes, *_reasons(old, new)), help=help)
    return found


def _difference(
    message: str, span: Span | None, label: str = "", notes: tuple[str, ...] = ()
) -> Diagnostic:
    return Diagnostic("lock-differs", message, span, label, notes=notes, severity="warning")


def _rules(old: Lock, new: Lock, places: Mapping[Rule, Span]) -> Iterator[Diagnostic]:
    for rule, now in new.matches.items():
        before = old.matches.get(rule)
        if before is None:
            message = f"`{rule.text}` is not in the lock"
            yield _difference(message, places[rule], f"matches {_names(len(now))}")
        elif before != now:
            message = f"`{rule.text}` matches otherwise than the lock says"
            came, went = now - before, before - now
            counts = [
                f"{_names(len(n))} {verb}" for n, verb in ((came, "came"), (went, "went")) if n
            ]
            notes = (*_listed("came", came), *_listed("went", went))
            yield _difference(message, places[rule], ", ".join(counts), notes)
    for rule in (rule for rule in old.matches if rule not in new.matches):
        of = f" of adapter `{rule.adapter}`" if rule.adapter else ""
        message = f"`{rule.text}`{of} is in the lock, and not in the spec"
        yield _difference(message, None, notes=_listed("went", old.matches[rule]))


def _ranks(old: Lock, new: Lock, plan: "Plan") -> Iterator[Diagnostic]:
    spans = {adapter.name: adapter.span for adapter in plan.spec.adapters}
    for adapter, ranks in new.ranks.items():
        before = old.ranks.get(adapter, {})
        changed: dict[tuple[int, int], list[str]] = {}
        for name in in_order(ranks.keys() & before.keys()):
            if before[name] != ranks[name]:
                changed.setdefault((before[name], ranks[name]), []).append(name)
        if changed:
            message = f"adapter `{adapter}` has other ranks than the lock says"
            label = f"at {_names(sum(map(len, changed.values())))}"
            notes = (
                note
                for (was, is_), names in changed.items()
                for note in _listed(f"rank {was} became {is_}", names)
            )
            yield _difference(message, spans[adapter], label, tuple(notes))


def _reasons(old: Lock, new: Lock) -> Iterator[str]:
    """Say what else is not as it was."""
    for path in sorted(old.files.keys() | new.files.keys()):
        if old.files.get(path) != new.files.get(path):
            yield f"`{path}` has changed since"
    if old.model.get("class") != new.model.get("class"):
        names = (lock.model.get("class", "model of another kind") for lock in (old, new))
        yield "the model was a `{}` and is a `{}`".format(*names)
    elif old.model != new.model:
        yield "the config of the model has changed since"


def _listed(word: str, names: Iterable[str]) -> tuple[str, ...]:
    folds = [f"`{one}`" for one in fold(in_order(names))]
    more = [f"{len(folds) - _MOST_NAMES} more"] if len(folds) > _MOST_NAMES else []
    return (f"{word}: {', '.join(folds[:_MOST_NAMES] + more)}",) if folds else ()


def _names(count: int) -> str:
    return f"{count} name{'s' * (count != 1)}"
