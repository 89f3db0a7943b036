"""The first file for any model."""

from lora_fx.diagnostics import Source
from lora_fx.spec import parse
from lora_fx.spec.formatter import format_source
from lora_fx.spec.starter import choices, starter_text

TEXT = starter_text(None, None)


def test_it_can_be_read_and_is_in_the_canonical_style() -> None:
    spec = parse(TEXT)
    assert [adapter.name for adapter in spec.adapters] == ["default"]
    assert spec.model is None
    assert format_source(Source("", TEXT)) == TEXT


def test_the_model_is_named_as_given() -> None:
    spec = parse(starter_text(None, 'a "b"'))
    assert spec.model is not None
    assert spec.model.path == 'a "b"'


def test_what_it_offers_can_be_read() -> None:
    for choice in choices(None):
        code = "\n".join(choice.code)
        assert all(f"# {line}" in TEXT for line in choice.code)
        adapters = "adapter default {{ target linear\n{} }}\n{}"
        parse("lora 1\n" + adapters.format(*((code, "") if choice.inside else ("", code))))


def test_the_bound_has_two_digits_and_some_room() -> None:
    def bound(share: float) -> str:
        return starter_text(None, None, share).split("check trainable <= ")[1].split("\n")[0]

    shares = (0.0123, 0.00101, 0.000456, 0.29, 0.5, 0.97)
    assert [bound(share) for share in shares] == ["1.4%", "0.12%", "0.051%", "32%", "56%", "100%"]
