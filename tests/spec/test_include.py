"""`include`: in place, once, inside the folder, and no more than a file may need."""

import os
from pathlib import Path

import pytest

from lora_fx.diagnostics import LoraFxError
from lora_fx.spec import parse

ADAPTER = "lora 1\nadapter {} {{ use small  target linear }}\n"


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.lora").write_text(text)
    return folder / "main.lora"


def codes(path: Path) -> list[str]:
    with pytest.raises(LoraFxError) as raised:
        parse(path)
    return [d.code for d in raised.value.diagnostics]


def test_statements_stand_in_the_place_of_the_include(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        main='lora 1\ninclude "one.lora"\nadapter two { use small  target linear }',
        one='lora 1\nadapter one { use small  target linear }\ninclude "small.lora"',
        small="lora 1\npreset small { rank = 3 }",
    )
    spec = parse(path)
    assert [adapter.name for adapter in spec.adapters] == ["one", "two"]
    setting = spec.adapters[0].settings["rank"]
    assert setting.span.source.name == str(tmp_path / "small.lora")
    assert spec.adapters[1].settings["rank"].span == setting.span


def test_a_file_is_read_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        main='lora 1\ninclude "one.lora"\ninclude "./one.lora"\ninclude "other.lora"',
        one='lora 1\ninclude "small.lora"\nadapter one { use small  target linear }',
        other='lora 1\ninclude "small.lora"',
        small="lora 1\npreset small { rank = 3 }",
    )
    assert [adapter.name for adapter in parse(path).adapters] == ["one"]


def test_a_path_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts", one='lora 1\ninclude "../small.lora"\n', other="lora 1")
    path = write(
        tmp_path,
        main='lora 1\ninclude "parts/one.lora"\nadapter x { use small  target linear }',
        small='lora 1\ninclude "parts/other.lora"\npreset small { rank = 3 }',
    )
    assert parse(path).adapters[0].settings["rank"].span.source.name.endswith("small.lora")


def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.lora").write_text("lora 1\npreset secret { rank = 3 }")
    os.symlink(tmp_path / "secret.lora", inside / "link.lora")
    path = write(inside, main='lora 1\ninclude "link.lora"\n')
    assert codes(path) == ["include-outside"]


def test_cycles_end(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        main='lora 1\ninclude "one.lora"\n',
        one='lora 1\ninclude "two.lora"\ninclude "one.lora"\n',
        two='lora 1\ninclude "one.lora"\n',
    )
    assert codes(path) == ["include-cycle", "include-cycle"]


def test_what_is_no_path_is_refused(tmp_path: Path) -> None:
    os.symlink(tmp_path / "loop.lora", tmp_path / "loop.lora")
    names = ["\0", "loop.lora", "x" * 5000, ".", "none.lora"]
    includes = "".join(f'include "{name}"\n' for name in names)
    assert codes(write(tmp_path, main=f"lora 1\n{includes}")) == ["unreadable-file"] * 5


def test_depth_is_bounded(tmp_path: Path) -> None:
    texts = {f"f{i}": f'lora 1\ninclude "f{i + 1}.lora"\n' for i in range(20)}
    path = write(tmp_path, main='lora 1\ninclude "f0.lora"\n', f20="lora 1", **texts)
    assert codes(path) == ["include-too-much"]
    path = write(tmp_path, main='lora 1\ninclude "f8.lora"\n', f20="lora 1", **texts)
    parse(path)


def test_size_is_bounded(tmp_path: Path) -> None:
    filler = dict.fromkeys((f"f{i}" for i in range(6)), "lora 1\n#" + "x" * 240_000)
    includes = "".join(f'include "{name}.lora"\n' for name in filler)
    path = write(tmp_path, main=f"lora 1\n{includes}", **filler)
    assert codes(path) == ["include-too-much"]


def test_faults_of_all_files_come_in_the_order_of_reading(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        main='lora 1\ninclude "one.lora"\nadapter x { rank = 0  target linear }',
        one="lora 2\nadapter y { rank 3  target linear }",
    )
    with pytest.raises(LoraFxError) as raised:
        parse(path)
    found = [(Path(d.span.source.name).name, d.code) for d in raised.value.diagnostics if d.span]
    assert found == [
        ("main.lora", "wrong-value"),
        ("one.lora", "unsupported-version"),
        ("one.lora", "syntax-error"),
    ]


def test_what_refers_to_a_file_that_could_not_be_read_is_not_to_blame(tmp_path: Path) -> None:
    path = write(tmp_path, main='lora 1\ninclude "none.lora"\nadapter x { use p  target linear }')
    assert codes(path) == ["unreadable-file"]
