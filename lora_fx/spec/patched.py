"""A text after corrections that remembers where its characters came from."""

from dataclasses import dataclass

from lora_fx.diagnostics import Source, Span


@dataclass(frozen=True)
class Patched:
    """A corrected text; `origin[i]` is the offset in the source of its character `i`."""

    source: Source
    text: str
    origin: tuple[int, ...]

    def replace(self, start: int, end: int, new: str) -> "Patched":
        """Return the text with `[start:end]` replaced by `new`."""
        old = self.origin[start:end] or (self.origin[max(start - 1, 0)],)
        origin = tuple(old[min(i, len(old) - 1)] for i in range(len(new)))
        return Patched(
            self.source,
            self.text[:start] + new + self.text[end:],
            self.origin[:start] + origin + self.origin[end:],
        )

    def span(self, start: int, end: int) -> Span:
        """Return where a part of this text stands in the source."""
        first = self.origin[start]
        return Span(
            self.source, first, max(self.origin[end - 1] + 1, first) if end > start else first
        )
