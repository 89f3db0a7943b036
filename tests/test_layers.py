"""Imports go downwards only, by this table."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lora_fx"

BELOW = {
    "diagnostics": "",
    "spec": "diagnostics",
    "graph": "diagnostics",
    "plan": "spec graph diagnostics",
    "rewrite": "graph diagnostics",
    "adapters": "plan spec graph diagnostics",
    "kernels": "graph diagnostics",
    "rules": "kernels adapters plan spec rewrite graph diagnostics",
    "passes": "kernels adapters plan spec rewrite graph diagnostics",
    "runtime": "passes kernels rules adapters plan spec rewrite graph diagnostics",
    "compiler": "runtime passes kernels rules adapters plan spec rewrite graph diagnostics",
    "cli": "compiler runtime passes kernels rules adapters plan spec rewrite graph diagnostics",
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """The parts of the package that a file imports, anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = node.module == "lora_fx"
            names = [f"lora_fx.{a.name}" for a in node.names] if whole else [str(node.module)]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "lora_fx" and rest:
                yield rest.partition(".")[0], getattr(node, "lineno", 0)


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    own = part_of(path)
    allowed = {own, *BELOW[own].split()}
    upwards = [f"line {line}: {part}" for part, line in imported(path) if part not in allowed]
    assert not upwards


def test_the_table_has_no_cycle() -> None:
    order = list(BELOW)
    for part, below in BELOW.items():
        assert all(order.index(b) < order.index(part) for b in below.split()), part


@pytest.mark.parametrize("statement", ["import lora_fx", "import lora_fx.spec, lora_fx.cli"])
def test_what_loads_no_torch(statement: str) -> None:
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
    control = f"{code.replace(statement, 'import lora_fx.plan')}"
    assert subprocess.run([sys.executable, "-c", control], cwd=PACKAGE.parent).returncode == 1
