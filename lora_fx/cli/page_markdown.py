"""A page as a terminal shows it: plainer than rich would, with examples that can be copied."""

from typing import ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.padding import Padding
from rich.text import Text
from rich.theme import Theme

_THEME = Theme({"markdown.code": "cyan"})
_HEADINGS = {"Wrong": "bold red", "Right": "bold green"}


class _Heading(Heading):
    """A line of its own, at the left."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text.plain, _HEADINGS.get(self.text.plain, "bold"))


class _Example(CodeBlock):
    """Indented, as it is written."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Padding(Text(str(self.text).rstrip(), no_wrap=True, overflow="ignore"), (0, 0, 0, 4))


class PageMarkdown(Markdown):
    """The Markdown of a page, to be printed by rich."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _Heading,
        "fence": _Example,
    }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render in the colours that fit dark and light terminals alike."""
        with console.use_theme(_THEME):
            yield from super().__rich_console__(console, options)
