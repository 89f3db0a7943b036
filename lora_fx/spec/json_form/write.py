"""A syntax tree as plain data, included files in place."""

from collections.abc import Iterable, Mapping
from typing import Any

from lora_fx.diagnostics import Span
from lora_fx.spec import syntax as s
from lora_fx.spec.expressions import Array, Expr, Literal, Negative
from lora_fx.spec.one_line import one_line

Data = dict[str, Any]


def file_to_json(file: s.File, texts: Mapping[Span, str]) -> Data:
    """Return what a file says, with `texts` in the place of the values or names at these spans."""
    writer = _Writer(texts)
    found: Data = {"lora": file.header.version}
    for statement in file.statements:
        match statement:
            case s.Let() | s.Preset() | s.Adapter() | s.Merge():
                key, value = writer.named(statement)
                found.setdefault(key, {})[statement.name.text] = value
            case s.Quantize():
                found.setdefault("quantize", []).append(writer.quantize(statement))
            case s.Check():
                found.setdefault("checks", []).append(writer.check(statement))
            case _:
                key, value = writer.single(statement)
                found[key] = value
    return found


class _Writer:
    def __init__(self, texts: Mapping[Span, str]) -> None:
        self._texts = texts

    def named(self, statement: s.Let | s.Preset | s.Adapter | s.Merge) -> tuple[str, Any]:
        match statement:
            case s.Let():
                return "let", _value(statement.value)
            case s.Preset():
                return "presets", self._attributes(statement.attributes)
            case s.Adapter():
                return "adapters", self._adapter(statement)
            case s.Merge():
                items = statement.items
                mix = next(item.mix for item in items if isinstance(item, s.From))
                return "merges", {"from": _text(mix.span), **self._attributes(items)}

    def single(self, statement: s.Statement) -> tuple[str, Any]:
        match statement:
            case s.Model():
                path = self._texts.get(statement.path.span, statement.path.text)
                return "model", _short({"path": path, **self._attributes(statement.attributes)})
            case s.Layers():
                return "layers", _ranges(statement) | self._attributes(statement.items)
            case s.Route():
                return "route", self._attributes(statement.items) | _mixes(statement)
            case s.Optimizer():
                return "optimizer", self._attributes(statement.attributes)
            case s.Compile():
                return "compile", self._compile(statement)
            case _:
                raise AssertionError(f"{statement} is no statement of a whole file")

    def quantize(self, quantize: s.Quantize) -> Data:
        return {"select": _text(quantize.selector.span), **self._attributes(quantize.attributes)}

    def check(self, check: s.Check) -> Any:
        message = {} if check.message is None else {"message": check.message}
        return _short({"condition": _text(check.condition.span), **message})

    def _adapter(self, adapter: s.Adapter) -> Data:
        """Put what a later `use` may override into the list of presets, in its order."""
        items = adapter.items
        settings = [i for i in items if isinstance(i, s.Use | s.Attribute)]
        last = max((n for n, i in enumerate(settings) if isinstance(i, s.Use)), default=-1)
        early, own = settings[: last + 1], settings[last + 1 :]
        use = [
            item.preset.text if isinstance(item, s.Use) else self._attributes([item])
            for item in early
        ]
        lists = {
            "use": use,
            "targets": [self._target(i) for i in items if isinstance(i, s.Target)],
            "train": [_selected(i) for i in items if isinstance(i, s.Train)],
            "tokens": [_tokens(i) for i in items if isinstance(i, s.Tokens)],
        }
        found = {key: value for key, value in lists.items() if value}
        first = {"use": found.pop("use")} if use else {}
        return first | self._attributes(own) | found

    def _target(self, target: s.Target) -> Any:
        chosen = _selected(target)
        attributes = self._attributes(target.attributes)
        if not attributes:
            return chosen
        return ({"select": chosen} if isinstance(chosen, str) else chosen) | attributes

    def _compile(self, compile: s.Compile) -> Data:
        entries = {
            entry.name.text: self._attributes(entry.attributes)
            for entry in compile.items
            if isinstance(entry, s.Entry)
        }
        return self._attributes(compile.items) | ({"entries": entries} if entries else {})

    def _attributes(self, items: Iterable[Any]) -> Data:
        return {
            item.name.text: {"text": self._texts[item.span]}
            if item.span in self._texts
            else _value(item.value)
            for item in items
            if isinstance(item, s.Attribute)
        }


def _value(expr: Expr) -> Any:
    match expr:
        case Literal(value=str()):
            return {"text": expr.value}
        case Literal():
            return expr.value
        case Negative(operand=Literal(value=int() | float() as number)) if type(number) is not bool:
            return -number
        case Array():
            return [_value(item) for item in expr.items]
        case _:
            return _text(expr.span)


def _text(span: Span) -> str:
    return one_line(span.text)


def _short(mapping: Data) -> Any:
    """Leave out the main key of a mapping that has no other."""
    return mapping if len(mapping) > 1 else next(iter(mapping.values()))


def _selected(item: s.Target | s.Train) -> Any:
    optional = {"optional": True} if item.optional else {}
    return _short({"select": _text(item.selector.span), **optional})


def _tokens(tokens: s.Tokens) -> Any:
    where = {"in": _text(tokens.atom.span)} if tokens.atom else {}
    return _short({"ids": _value(tokens.ids), **where})


def _ranges(layers: s.Layers) -> Data:
    keys = {s.Replicate: "replicate", s.Drop: "drop"}
    return {
        keys[type(item)]: [_text(part.span) for part in item.ranges]
        for item in layers.items
        if isinstance(item, s.Replicate | s.Drop)
    }


def _mixes(route: s.Route) -> Data:
    found: Data = {}
    for item in route.items:
        if isinstance(item, s.When):
            found.setdefault("when", {})[item.name.text] = _text(item.mix.span)
        elif isinstance(item, s.Otherwise):
            found["default"] = _text(item.mix.span)
    return found
