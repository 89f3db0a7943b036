"""Plain data as the text of a `.lora` file."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lora_fx.diagnostics import LoraFxError
from lora_fx.spec.attributes import ADAPTER
from lora_fx.spec.blocks import COMPILE, ENTRY, LAYERS, MERGE, MODEL, OPTIMIZER, QUANTIZE, ROUTE
from lora_fx.spec.expressions import show
from lora_fx.spec.json_form.values import Values
from lora_fx.spec.rule import Rules

Lines = list[str]
_RANGE = re.compile(r"\d+|\d+\.\.|\.\.\d+|\d+\.\.\d+", re.ASCII)


def json_to_text(data: Any) -> str:
    """Return the `.lora` text that a spec's data stands for.

    Raises LoraFxError with everything that is not of the form, by its place in the data.
    """
    reader = _Reader()
    text = reader.file(data)
    if reader.faults:
        raise LoraFxError(reader.faults)
    return text


class _Reader(Values):
    """One method for each key of the data, which returns the lines of its statements."""

    def file(self, data: Any) -> str:
        statements: Mapping[str, Callable[[Any, str], Lines]] = {
            "include": self._list(lambda v, at: [f"include {self.quoted(v, at)}"]),
            "let": self._named(lambda name, v, at: [f"let {name} = {self.value(v, at)}"]),
            "model": self._model,
            "layers": self._layers,
            "quantize": self._list(self._quantize),
            "presets": self._named(self._preset),
            "adapters": self._titled(self._adapter),
            "route": self._route,
            "merges": self._titled(self._merge),
            "optimizer": lambda v, at: self._block("optimizer", v, at, OPTIMIZER),
            "checks": self._list(self._check),
            "compile": self._compile,
        }
        given = self.mapping(data, "$", ("lora", *statements), needs=("lora",))
        version = given.pop("lora", 1)
        if type(version) is not int or version < 0:
            self.fault("$.lora", "must be the version of the language, a whole number", version)
        parts = (statements[key](value, f"$.{key}") for key, value in given.items())
        return "\n".join([f"lora {version}", *_spaced(line for part in parts for line in part), ""])

    # statements

    def _model(self, value: Any, at: str) -> Lines:
        given = self.mapping(_full("path", value), at, ("path", *MODEL), needs=("path",))
        path = self.quoted(given.pop("path", "x"), f"{at}.path")
        return _block_if(f"model {path}", self._attributes(given, at))

    def _layers(self, value: Any, at: str) -> Lines:
        given = self.mapping(value, at, ("replicate", "drop", *LAYERS))
        ranges = []
        for key in ("replicate", "drop"):
            if key in given:
                parts = self.items(given.pop(key), f"{at}.{key}")
                ranges += [f"{key} {', '.join(self._range(v, a) for v, a in parts)}"]
        return _block("layers", ranges + self._attributes(given, at))

    def _range(self, value: Any, at: str) -> str:
        text = str(value) if type(value) is int else value
        if not isinstance(text, str) or not _RANGE.fullmatch(text):
            self.fault(at, 'must be a range of layers: `"0..4"`, `"8.."`, `"..4"` or `8`', value)
        return str(text)

    def _quantize(self, value: Any, at: str) -> Lines:
        given = self.mapping(value, at, ("select", *QUANTIZE), needs=("select",))
        selector = self.fragment("selector", given.pop("select", "linear"), f"{at}.select")
        return _block(f"quantize {selector}", self._attributes(given, at))

    def _preset(self, name: str, value: Any, at: str) -> Lines:
        return self._block(f"preset {name}", value, at, ADAPTER)

    def _check(self, value: Any, at: str) -> Lines:
        given = self.mapping(
            _full("condition", value), at, ("condition", "message"), needs=("condition",)
        )
        condition = self._condition(given.get("condition", True), f"{at}.condition")
        message = self.quoted(given["message"], f"{at}.message") if "message" in given else ""
        return [f"check {condition}" + (f" : {message}" if message else "")]

    def _condition(self, value: Any, at: str) -> str:
        return show(value) if isinstance(value, bool) else self.fragment("expression", value, at)

    # adapters

    def _adapter(self, name: str, value: Any, at: str) -> Lines:
        items = {
            "use": self._list(self._use),
            "targets": self._list(self._target),
            "train": self._list(self._train),
            "tokens": self._list(self._tokens),
        }
        given = self.mapping(value, at, (*items, *ADAPTER))
        parts = {key: items[key](given.pop(key), f"{at}.{key}") for key in items if key in given}
        first = parts.pop("use", [])
        rest = [line for key in items for line in parts.get(key, [])]
        return _block(f"adapter {name}", [*first, *self._attributes(given, at), *rest])

    def _use(self, value: Any, at: str) -> Lines:
        if isinstance(value, Mapping):
            return self._attributes(self.mapping(value, at, ADAPTER), at)
        return [f"use {self.name(value, at)}"]

    def _target(self, value: Any, at: str) -> Lines:
        given, statement = self._selected("target", value, at, ADAPTER)
        return _block_if(statement, self._attributes(given, at))

    def _train(self, value: Any, at: str) -> Lines:
        return [self._selected("train", value, at, {})[1]]

    def _selected(self, word: str, value: Any, at: str, table: Rules) -> tuple[dict[str, Any], str]:
        given = self.mapping(
            _full("select", value), at, ("select", "optional", *table), needs=("select",)
        )
        optional = given.pop("optional", False)
        if not isinstance(optional, bool):
            self.fault(f"{at}.optional", "must be true or false", optional)
        selector = self.fragment("selector", given.pop("select", "linear"), f"{at}.select")
        return given, f"{word}{'?' if optional else ''} {selector}"

    def _tokens(self, value: Any, at: str) -> Lines:
        given = self.mapping(_full("ids", value), at, ("ids", "in"), needs=("ids",))
        ids = given.get("ids", [])
        if not isinstance(ids, list | tuple):
            self.fault(f"{at}.ids", "must be a list of token ids", ids)
        where = ""
        if "in" in given:
            where = f" in {self.fragment('pattern', given['in'], f'{at}.in')}"
        return [f"tokens {self.value(ids, f'{at}.ids')}{where}"]

    # routes, merges and compilation

    def _route(self, value: Any, at: str) -> Lines:
        given = self.mapping(value, at, ("when", "default", *ROUTE))
        mixes: Lines = []
        if "when" in given:
            whens = self.entries(given.pop("when"), f"{at}.when")
            mixes = [
                f"when {self.quoted(k, a)} -> {self.fragment('mix', v, a)}" for k, v, a in whens
            ]
        if "default" in given:
            mix = self.fragment("mix", given.pop("default"), f"{at}.default")
            mixes.append(f"default -> {mix}")
        return _block("route", self._attributes(given, at) + mixes)

    def _merge(self, name: str, value: Any, at: str) -> Lines:
        given = self.mapping(value, at, ("from", *MERGE), needs=("from",))
        mix = self.fragment("mix", given.pop("from", "x"), f"{at}.from")
        return _block(f"merge {name}", [f"from {mix}", *self._attributes(given, at)])

    def _compile(self, value: Any, at: str) -> Lines:
        given = self.mapping(value, at, ("entries", *COMPILE))
        entries: Lines = []
        if "entries" in given:
            named = self._named(lambda name, v, a: self._block(f"entry {name}", v, a, ENTRY))
            entries = named(given.pop("entries"), f"{at}.entries")
        return _block("compile", self._attributes(given, at) + entries)

    # what statements are made of

    def _block(self, head: str, value: Any, at: str, table: Rules) -> Lines:
        return _block(head, self._attributes(self.mapping(value, at, table), at))

    def _attributes(self, given: Mapping[str, Any], at: str) -> Lines:
        return [f"{name} = {self.value(value, f'{at}.{name}')}" for name, value in given.items()]

    def _list(self, one: Callable[[Any, str], Lines]) -> Callable[[Any, str], Lines]:
        return lambda value, at: [line for v, a in self.items(value, at) for line in one(v, a)]

    def _named(self, one: Callable[[str, Any, str], Lines]) -> Callable[[Any, str], Lines]:
        return lambda value, at: [
            line for key, v, a in self.entries(value, at) for line in one(self.name(key, a), v, a)
        ]

    def _titled(self, one: Callable[[str, Any, str], Lines]) -> Callable[[Any, str], Lines]:
        return lambda value, at: [
            line for key, v, a in self.entries(value, at) for line in one(self.title(key, a), v, a)
        ]


def _spaced(lines: Iterable[str]) -> Iterator[str]:
    """Put blank lines around blocks."""
    previous = "}"
    for line in lines:
        if previous == "}" or (line.endswith("{") and not line.startswith(" ")):
            yield ""
        previous = line
        yield line


def _full(key: str, value: Any) -> Any:
    return value if isinstance(value, Mapping) else {key: value}


def _block(head: str, lines: Iterable[str]) -> Lines:
    return [f"{head} {{", *(f"  {line}" for line in lines), "}"]


def _block_if(head: str, lines: Lines) -> Lines:
    return _block(head, lines) if lines else [head]
