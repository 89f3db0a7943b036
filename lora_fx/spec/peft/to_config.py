"""A spec as PEFT's configs without a model: what its patterns and constants say by themselves."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.spec.attributes import ADAPTER
from lora_fx.spec.evaluate import evaluate, no_environment
from lora_fx.spec.expressions import Reference, Value, Word, references
from lora_fx.spec.patterns import glob_to_regex
from lora_fx.spec.peft.methods import has_bias, init_settings, variant_settings
from lora_fx.spec.peft.unsaid import unsaid
from lora_fx.spec.rule import completed
from lora_fx.spec.selectors import Atom, Range, Selector
from lora_fx.spec.spec import AdapterSpec, LayersSpec, Setting, Spec, Target, Train

_ONE_BY_MODULE = ("rank", "alpha")
_NEVER = {"dtype": Word("float32"), "compute": Word("activation"), "offload": False}
_HELP = "plan it on a model: `lora_fx.plan(spec, model).to_peft()` names the modules themselves"


def to_configs(spec: Spec) -> dict[str, dict[str, Any]]:
    """Return the `LoraConfig` settings of each adapter, by its name.

    Raises LoraFxError with everything that PEFT cannot say, and with everything that it could only
    say of a given model.
    """
    faults = unsaid(spec)
    configs = {}
    for adapter in spec.adapters:
        translation = _Adapter(adapter, faults)
        configs[adapter.name] = translation.config() | _replication(spec.layers, faults)
    if faults:
        raise LoraFxError(faults)
    return configs


def _replication(layers: LayersSpec | None, faults: list[Diagnostic]) -> dict[str, Any]:
    if layers is None:
        return {}
    if layers.dropped or any(part.end is None for part in layers.ranges):
        faults.append(
            _not_without_model("how many layers there are depends on the model", layers.span)
        )
    return {"layer_replication": [[part.start or 0, part.end] for part in layers.ranges]}


class _Adapter:
    """The translation of one adapter; what cannot be said goes to `faults`."""

    def __init__(self, adapter: AdapterSpec, faults: list[Diagnostic]) -> None:
        self._adapter = adapter
        self._faults = faults

    def config(self) -> dict[str, Any]:
        values = {name: self._once(name) for name in ADAPTER if name not in _ONE_BY_MODULE}
        init, variant = values["init"], values["variant"]
        assert isinstance(init, Word)
        assert isinstance(variant, Word)
        if "weights" in self._adapter.settings:
            span = self._adapter.settings["weights"].span
            self._faults.append(_never("a PEFT config does not say where weights are", span))
        if values["lora_bias"] and not has_bias(init):
            span = self._adapter.settings["init"].span
            self._faults.append(_never("PEFT has `lora_bias` with its default init only", span))
        if not isinstance(values["scaling"], Word):
            span = self._adapter.settings["scaling"].span
            self._faults.append(_not_without_model("PEFT has no scaling but α/r and α/√r", span))
        return {
            "peft_type": "LORA",
            **self._targets(),
            **self._by_module(),
            "use_rslora": values["scaling"] == Word("rslora"),
            "lora_dropout": values["dropout"],
            "lora_bias": values["lora_bias"],
            "ensure_weight_tying": values["tie"],
            "bias": values["bias"].name if isinstance(values["bias"], Word) else "none",
            "modules_to_save": [n for train in self._adapter.trains for n in self._trained(train)]
            or None,
            "trainable_token_indices": self._tokens(),
            "inference_mode": values["trainable"] is not True,
            **init_settings(init),
            **variant_settings(variant),
        }

    def _once(self, name: str) -> Value | None:
        """Return the one value of an attribute; PEFT has no others for single modules."""
        rule = ADAPTER[name]
        for target in self._adapter.targets:
            if name in target.settings:
                message = f"PEFT has one `{name}` for the whole adapter"
                self._faults.append(_never(message, target.settings[name].span))
        setting = self._adapter.settings.get(name)
        value = self._constant(setting) if setting else rule.default
        if name in _NEVER and value not in (None, _NEVER[name]) and setting:
            self._faults.append(_never(f"a PEFT config has no `{name}`", setting.span))
        value = rule.default if value is None else value
        return value if value is None else completed(rule, value)

    def _constant(self, setting: Setting, known: Mapping[str, Value] | None = None) -> Value | None:
        def environment(reference: Reference) -> Value:
            value = (known or {}).get(str(reference))
            return no_environment(reference) if value is None else value

        if any(str(reference) not in (known or {}) for reference in references(setting.value)):
            self._faults.append(_not_without_model("its value depends on the module", setting.span))
            return None
        return evaluate(setting.value, environment)

    def _targets(self) -> dict[str, Any]:
        targets = self._adapter.targets
        parameters = [a for t in targets for a in t.selector.atoms if a.kind == "parameter"]
        if parameters:
            message = "PEFT names parameters by their ends; patterns of them need the model"
            self._faults.append(_not_without_model(message, parameters[0].span))
        if len(targets) == 1 and _is_all_linear(targets[0].selector):
            return {"target_modules": "all-linear"}
        atoms = [atom for target in targets for atom in target.selector.atoms]
        if all(atom.kind == "name" for atom in atoms) and not any(map(_is_narrowed, targets)):
            return {"target_modules": sorted({atom.pattern for atom in atoms})}
        regexes = dict.fromkeys(self._regex(target.selector) for target in targets)
        return {"target_modules": "|".join(f"(?:{regex})" for regex in regexes)}

    def _by_module(self) -> dict[str, Any]:
        """Return ranks and alphas; PEFT takes the first pattern that fits, a spec the last rule."""
        own = self._adapter.settings
        rank = self._constant(own["rank"]) if "rank" in own else ADAPTER["rank"].default
        ranks = self._values("rank")
        alphas = self._values("alpha")
        if "alpha" not in own:
            alpha = ADAPTER["alpha"].default
        elif not any(references(own["alpha"].value)):
            alpha = self._constant(own["alpha"])
        elif alphas or rank is None:
            alpha = None
            message = "which rank it follows depends on the module"
            self._faults.append(_not_without_model(message, own["alpha"].span))
        else:
            alpha = self._constant(own["alpha"], {"rank": rank})
            alphas = {k: self._constant(own["alpha"], {"rank": v}) for k, v in ranks.items()}
        return {"r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas}

    def _values(self, name: str) -> dict[str, Any]:
        """Return what the targets set an attribute to, the last one first."""
        found: dict[str, Any] = {}
        for target in reversed(self._adapter.targets):
            if name in target.settings:
                value = self._constant(target.settings[name])
                if value is not None:
                    found.setdefault(self._key(target), value)
        return found

    def _key(self, target: Target) -> str:
        atoms = target.selector.atoms
        if len(atoms) == 1 and atoms[0].kind == "name" and not _is_narrowed(target):
            return re.escape(atoms[0].pattern)
        return f"^(?:{self._regex(target.selector)})"

    def _regex(self, selector: Selector) -> str:
        """Return a regex that fully matches the names of exactly the selected modules."""
        before = ""
        if selector.excludes:
            before += f"(?!(?:{'|'.join(map(self._atom, selector.excludes))})$)"
        if selector.layers is not None:
            before += self._layers(selector.layers, selector.stack)
        if selector.conditions:
            span = selector.conditions[0].span
            self._faults.append(_not_without_model("PEFT has no conditions", span))
        return f"{before}(?:{'|'.join(map(self._atom, selector.atoms))})"

    def _atom(self, atom: Atom) -> str:
        match atom.kind:
            case "name":
                return rf"(?:.*\.)?{re.escape(atom.pattern)}"
            case "glob":
                return glob_to_regex(atom.pattern).pattern
            case "regex":
                return f"(?:{atom.pattern})"
            case "parameter":
                return ""
            case _:
                message = f"PEFT cannot join `{atom}` with anything else"
                self._faults.append(_not_without_model(message, atom.span))
                return ""

    def _layers(self, ranges: Sequence[Range], stack: str | None) -> str:
        numbers = []
        for part in ranges:
            if part.end is None:
                message = "how many layers there are depends on the model"
                self._faults.append(_not_without_model(message, part.span))
            else:
                numbers += range(part.start or 0, part.end)
        before = r"(?:[^.\d][^.]*\.)*" if stack is None else re.escape(f"{stack}.")
        return rf"(?={before}(?:{'|'.join(map(str, numbers))})\.)"

    def _trained(self, train: Train) -> Iterator[str]:
        """Yield names for `modules_to_save`, which PEFT compares with the ends of names."""
        selector = train.selector
        narrowed = selector.excludes or selector.layers or selector.conditions
        for atom in selector.atoms:
            end = re.fullmatch(r"\*\*\.\*([^*{}]+)", atom.pattern) if atom.kind == "glob" else None
            if end and not narrowed:
                yield end[1]
            else:
                message = f"PEFT trains every module whose name ends with the text of `{atom}`"
                self._faults.append(_not_without_model(message, atom.span))

    def _tokens(self) -> Any:
        tokens = self._adapter.tokens
        if not tokens:
            return None
        if len(tokens) == 1 and tokens[0].atom is None:
            return list(tokens[0].ids)
        found = {}
        for one in tokens:
            if one.atom is None or one.atom.kind != "name":
                message = "PEFT names the embeddings of tokens one by one"
                self._faults.append(_not_without_model(message, one.span))
            else:
                found[one.atom.pattern] = list(one.ids)
        return found


def _is_narrowed(target: Target) -> bool:
    selector = target.selector
    return bool(selector.excludes or selector.conditions) or selector.layers is not None


def _is_all_linear(selector: Selector) -> bool:
    plain = not (selector.excludes or selector.conditions) and selector.layers is None
    return plain and [atom.kind for atom in selector.atoms] == ["linear"]


def _never(message: str, span: Span) -> Diagnostic:
    return Diagnostic("peft-cannot-say", message, span)


def _not_without_model(message: str, span: Span) -> Diagnostic:
    return Diagnostic("peft-cannot-say", message, span, help=_HELP)
