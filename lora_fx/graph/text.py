"""A graph as stable text: for people, goldens and diffs.

    %h: f32[s0, 4] = lora_fx.shrink(%x, @q_proj.lora_A.default.weight, 0.0, 'activation')

Weights print as `@fqn` where they are used, symbolic sizes are renamed s0, s1, … in order of
appearance, and the bodies of higher-order operators follow indented. No addresses, no paths.
"""

import re
from typing import Any

import torch
from torch.fx import GraphModule, Node

FQN = "lora_fx_fqn"
_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "b1",
}


def text(module: GraphModule, within: str = "") -> str:
    """Print every node in order with its type and, behind `#`, what made it.

    Weights of the module `within` are printed relative to it.
    """
    return "\n".join(_Printer(f"{within}." if within else "").lines(module, ""))


class _Printer:
    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._symbols: dict[str, str] = {}

    def lines(self, module: GraphModule, indent: str) -> list[str]:
        printed = []
        for node in module.graph.nodes:
            if not self._is_inline(node):
                printed.append(indent + self._line(node))
                for body in _bodies(module, node):
                    printed += self.lines(body, indent + "    ")
        return printed

    def _is_inline(self, node: Node) -> bool:
        """Weights, sizes and bodies are shown where they are used."""
        value = node.meta.get("example_value")
        return (
            FQN in node.meta
            or node.op == "get_attr"
            or (node.op == "placeholder" and isinstance(value, int | torch.SymInt))
        )

    def _line(self, node: Node) -> str:
        if node.op == "output":
            return f"return {self._value(node.args[0])}"
        head = f"%{node.name}{self._type(node.meta.get('example_value'))}"
        if node.op == "placeholder":
            return f"{head} = input"
        arguments = [self._value(a) for a in node.args]
        arguments += [f"{k}={self._value(v)}" for k, v in node.kwargs.items()]
        return f"{head} = {_target(node)}({', '.join(arguments)}){_comment(node)}"

    def _value(self, value: Any) -> str:
        if isinstance(value, Node):
            return self._node(value)
        if isinstance(value, list):
            return f"[{', '.join(map(self._value, value))}]"
        if isinstance(value, tuple):
            return f"({', '.join(map(self._value, value))})"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(map(self._value, parts))})"
        return str(value) if isinstance(value, torch.dtype | torch.device) else repr(value)

    def _node(self, node: Node) -> str:
        if FQN in node.meta:
            return f"@{node.meta[FQN].removeprefix(self._prefix)}"
        value = node.meta.get("example_value")
        if node.op == "placeholder" and isinstance(value, int | torch.SymInt):
            return self._size(value)
        return str(node.target) if node.op == "get_attr" else f"%{node.name}"

    def _type(self, value: Any) -> str:
        if not isinstance(value, torch.Tensor):
            return ""
        sizes = ", ".join(self._size(size) for size in value.shape)
        return f": {_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"

    def _size(self, size: Any) -> str:
        def rename(found: re.Match[str]) -> str:
            return self._symbols.setdefault(found[0], f"s{len(self._symbols)}")

        return str(size) if isinstance(size, int) else re.sub(r"\bs\d+\b", rename, str(size))


def _bodies(module: GraphModule, node: Node) -> list[GraphModule]:
    names = [a.target for a in node.all_input_nodes if a.op == "get_attr"]
    found = [getattr(module, str(name), None) for name in names]
    return [body for body in found if isinstance(body, GraphModule)]


def _target(node: Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.name.replace("::", ".")
    return getattr(node.target, "__name__", str(node.target))


def _comment(node: Node) -> str:
    made = node.meta.get("lora_fx", {})
    words = [str(made[key]) for key in ("rule", "adapters", "spec") if key in made]
    return f"   # {' | '.join(words)}" if words else ""
