"""Match a rule's selector against a module tree."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn
from transformers import PreTrainedModel

from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.stacks import Stack, place_of
from lora_fx.spec.selectors import Atom, Range, glob_to_regex
from lora_fx.spec.spec import Target


@dataclass(frozen=True)
class Tree:
    """A model's modules by fqn, its stacks, and its linear layers but the output head."""

    modules: dict[str, nn.Module]
    stacks: list[Stack]
    linears: frozenset[str]


Condition = Callable[[Target, str], bool]


def linear_modules(model: nn.Module) -> frozenset[str]:
    """Return the fqns of all linear layers but the output head (PEFT's `all-linear`)."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return frozenset(
        fqn
        for fqn, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in f".{fqn}"
    )


def select(
    target: Target, tree: Tree, holds: Condition, diagnostics: list[Diagnostic]
) -> list[str]:
    """Return the fqns a target selects, in module order, and note what is wrong with it.

    Each atom is judged alone first: one that matches no module is an error at the atom (a note
    with `target?`). One that the clauses empty is a note; a rule that selects nothing, an error.
    """
    selector = target.selector
    excluded: set[str] = set()
    for atom in selector.excludes:
        matched = _match(atom, tree)
        if not matched:
            diagnostics.append(_unmatched(atom, tree, optional=False))
        excluded |= matched
    if _names_no_stack(target, tree, diagnostics):
        return []
    chosen: set[str] = set()
    matched_any = False
    for atom in selector.atoms:
        matched = _match(atom, tree)
        if not matched:
            diagnostics.append(_unmatched(atom, tree, target.optional))
            continue
        matched_any = True
        kept = {f for f in matched - excluded if _in_layers(target, f, tree) and holds(target, f)}
        if not kept and len(selector.atoms) > 1:
            diagnostics.append(_emptied(atom, len(matched)))
        chosen |= kept
    if matched_any and not chosen:
        diagnostics.append(_selects_nothing(target))
    return [fqn for fqn in tree.modules if fqn in chosen]


def _match(atom: Atom, tree: Tree) -> set[str]:
    if atom.kind == "linear":
        return set(tree.linears)
    if atom.kind == "name":
        end = f".{atom.pattern}"
        return {fqn for fqn in tree.modules if fqn == atom.pattern or fqn.endswith(end)}
    regex = glob_to_regex(atom.pattern)
    return {fqn for fqn in tree.modules if regex.fullmatch(fqn)}


def _in_layers(target: Target, fqn: str, tree: Tree) -> bool:
    ranges = target.selector.layers
    if ranges is None:
        return True
    place = place_of(fqn, tree.stacks)
    if place is None or target.selector.stack not in (None, place.stack.fqn):
        return False
    return any(_contains(r, place.index) for r in ranges)


def _contains(wanted: Range, index: int) -> bool:
    return (wanted.start or 0) <= index and (wanted.end is None or index < wanted.end)


def _names_no_stack(target: Target, tree: Tree, diagnostics: list[Diagnostic]) -> bool:
    """Note what is wrong with `in layers`: no such stack, several, or layers beyond its end."""
    selector = target.selector
    if selector.layers is None:
        return False
    named = [s for s in tree.stacks if selector.stack in (None, s.fqn)]
    if len(named) != 1:
        names = ", ".join(f"`{stack.fqn}`" for stack in tree.stacks) or "none"
        wanted = f"no stack `{selector.stack}`" if selector.stack else "more than one stack"
        message = f"`in layers` needs a stack of layers, and there is {wanted if tree.stacks else 'none'}"
        help = 'write `in layers of "…" [ … ]`' if len(tree.stacks) > 1 else None
        diagnostics.append(
            Diagnostic(
                "ambiguous-stack", message, selector.span, notes=(f"stacks: {names}",), help=help
            )
        )
        return True
    count = len(named[0].layers)
    for wanted in selector.layers:
        if max(wanted.start or 0, (wanted.end or 1) - 1) >= count or (
            wanted.end is not None and (wanted.start or 0) >= wanted.end
        ):
            message = f"`{wanted}` is no range of this model's layers"
            label = f"the model has {count} layers, 0..{count}"
            diagnostics.append(Diagnostic("layer-range", message, wanted.span, label))
    return False


def _unmatched(atom: Atom, tree: Tree, optional: bool) -> Diagnostic:
    candidates = (
        {fqn.rpartition(".")[2] for fqn in tree.modules}
        if atom.kind == "name"
        else {re.sub(r"\.\d+(?=\.|$)", ".*", fqn) for fqn in tree.modules}
    )
    close = get_close_matches(atom.pattern, sorted(candidates - {"", "*"}), n=1, cutoff=0.5)
    written = f'"{close[0]}"' if close and atom.kind == "glob" else close[0] if close else ""
    return Diagnostic(
        "unmatched-target",
        f"`{atom}` matches no module of the model",
        atom.span,
        f"matched 0 of {len(tree.modules)} modules",
        help=f"did you mean `{written}`?" if close else None,
        severity="note" if optional else "error",
    )


def _emptied(atom: Atom, count: int) -> Diagnostic:
    return Diagnostic(
        "emptied-target",
        f"`{atom}` selects nothing here",
        atom.span,
        f"matched {count} modules, and the rule's clauses leave none of them",
        severity="note",
    )


def _selects_nothing(target: Target) -> Diagnostic:
    return Diagnostic(
        "empty-target",
        f"`{target.selector.text}` selects no module",
        target.selector.span,
        "its patterns match, and its clauses leave nothing",
        severity="note" if target.optional else "error",
    )
