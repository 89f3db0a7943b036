"""`include "file"`: the statements of another file, in place."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source, Span
from lora_fx.spec.load import load
from lora_fx.spec.parser import parse_source
from lora_fx.spec.syntax import File, Header, Include, Name, Statement

_VERSION = 1
_MOST_DEEP = 16
_MOST_FILES = 64
_MOST_CHARACTERS = 1_000_000


def read_whole(source: Source, path: Path | None) -> tuple[File | None, list[Diagnostic]]:
    """Return the syntax tree of a file with what it includes, and everything that is wrong.

    A path is relative to the file that names it and stays inside the folder of the first file (for
    a text, of the working directory). A file is read once, however often it is included. Number,
    depth and total size of the files are bounded.
    """
    reader = _Reader((path.parent if path else Path()).resolve())
    file = reader.read(source, (path or Path("<text>")).resolve(), ())
    return file and replace(file, whole=reader.whole), reader.diagnostics


@dataclass
class _Reader:
    root: Path
    diagnostics: list[Diagnostic] = field(default_factory=list)
    seen: set[Path] = field(default_factory=set)
    characters: int = 0
    whole: bool = True

    def read(self, source: Source, path: Path, chain: tuple[Path, ...]) -> File | None:
        self.seen.add(path)
        self.characters += len(source.text)
        file, faults = parse_source(source)
        self.diagnostics += faults
        if file is None:
            return None
        self.whole = self.whole and file.whole
        self.diagnostics += _version_faults(file.header)
        chain = (*chain, path)
        parts = [part for one in file.statements for part in self._expanded(one, path, chain)]
        return replace(file, statements=tuple(parts))

    def _expanded(
        self, statement: Statement, path: Path, chain: tuple[Path, ...]
    ) -> Iterator[Statement]:
        if not isinstance(statement, Include):
            yield statement
            return
        included = self._included(statement.path, path, chain)
        if included is None:
            self.whole = False
        else:
            yield from included.statements

    def _included(self, named: Name, path: Path, chain: tuple[Path, ...]) -> File | None:
        """Read an included file; one that was read already says nothing more."""
        try:
            there = (path.parent / named.text).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            self._unreadable(named, str(error))
            return None
        fault = self._fault(named, there, chain)
        if fault is not None:
            self.diagnostics.append(fault)
            return None
        if there in self.seen:
            return File(Header(_VERSION, named.span), ())
        source = self._source(named, there)
        return source and self.read(source, there, chain)

    def _fault(self, named: Name, there: Path, chain: tuple[Path, ...]) -> Diagnostic | None:
        if there in chain:
            around = " → ".join(f"`{p.name}`" for p in (*chain[chain.index(there) :], there))
            return _refused("include-cycle", f'"{named.text}" includes itself', named.span, around)
        if not there.is_relative_to(self.root):
            message = f'"{named.text}" lies outside the folder of the spec'
            label = f"the folder is `{self.root.name or self.root}`"
            return _refused("include-outside", message, named.span, label)
        if len(chain) >= _MOST_DEEP or len(self.seen) >= _MOST_FILES:
            message = f"more than {_MOST_FILES} files, or more than {_MOST_DEEP} inside each other"
            return _refused("include-too-much", message, named.span)
        if self.characters > _MOST_CHARACTERS:
            message = f"the files are longer than {_MOST_CHARACTERS} characters together"
            return _refused("include-too-much", message, named.span)
        return None

    def _source(self, named: Name, there: Path) -> Source | None:
        try:
            source, _ = load(there)
        except LoraFxError as error:
            self._unreadable(named, error.diagnostics[0].notes[0])
            return None
        beside = Path(named.span.source.name).parent / named.text
        return Source(str(beside), source.text)

    def _unreadable(self, named: Name, reason: str) -> None:
        message = f'"{named.text}" cannot be read'
        self.diagnostics.append(_refused("unreadable-file", message, named.span, reason))


def _refused(code: str, message: str, span: Span, label: str = "") -> Diagnostic:
    return Diagnostic(code, message, span, label)


def _version_faults(header: Header) -> list[Diagnostic]:
    if header.version == _VERSION:
        return []
    message = f"version {header.version} of the language is not known"
    help = f"write `lora {_VERSION}`"
    return [Diagnostic("unsupported-version", message, header.span, help=help)]
