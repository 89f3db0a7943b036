"""What the names inside an expression stand for, which depends on where it is written."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_fx.diagnostics import Diagnostic
from lora_fx.spec.attributes import ADAPTER, COMPILE, MODEL, words
from lora_fx.spec.closest import did_you_mean
from lora_fx.spec.expressions import (
    Array,
    Call,
    Expr,
    Keyword,
    Literal,
    Reference,
    Value,
    Word,
    children,
    substitute,
)

_LAYER = ("layer.index", "layer.count")
_MODULE = ("module.name", "module.in_features", "module.out_features", "module.class")
_CONFIG = "model.config"
_CHECK = ("trainable", "trainable_parameters", "sites", "memory", "layer.count")
_EVERYWHERE = (*_LAYER, *_MODULE, _CONFIG, *ADAPTER, *_CHECK)
FUNCTIONS: Mapping[str, tuple[int, int | None]] = {
    "min": (1, None),
    "max": (1, None),
    "round": (1, 1),
    "sqrt": (1, 1),
}


@dataclass(frozen=True)
class Scope:
    """A place for expressions: the dotted names and the bare words that have a meaning there."""

    place: str
    names: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


CONSTANT = Scope("a constant", words=words(ADAPTER, MODEL, COMPILE))
ATTRIBUTE = Scope("an attribute", (*_LAYER, *_MODULE, _CONFIG, *ADAPTER), words(ADAPTER))
WHERE = Scope("`where`", (*_LAYER, *_MODULE, _CONFIG))
CHECK = Scope("`check`", (*_CHECK, _CONFIG))
MODEL_BLOCK = Scope("`model`", words=words(MODEL))
COMPILE_BLOCK = Scope("`compile`", words=words(COMPILE))


@dataclass
class Names:
    """The constants of a file, and what was found wrong while looking names up."""

    constants: Mapping[str, Value | None]
    diagnostics: list[Diagnostic] = field(default_factory=list)

    def resolve(self, expr: Expr, scope: Scope) -> Expr | None:
        """Return the expression with constants and words in place; None if a name has no meaning.

        None without a diagnostic stands for a constant that is itself at fault.
        """
        found = len(self.diagnostics)
        failed = False

        def leaf(reference: Reference) -> Expr:
            nonlocal failed
            value = self._value(reference, scope)
            failed = failed or value is None
            return value or reference

        self._check_calls(expr, scope)
        resolved = substitute(expr, leaf)
        return None if failed or len(self.diagnostics) > found else resolved

    def _value(self, reference: Reference, scope: Scope) -> Expr | None:
        name = str(reference)
        if name in self.constants:
            if name in scope.names or name in scope.words:
                self._ambiguous(reference, scope)
            value = self.constants[name]
            return None if value is None else Literal(value, reference.span)
        if name in scope.words:
            return Literal(Word(name), reference.span)
        if name in scope.names or (_CONFIG in scope.names and name.startswith(f"{_CONFIG}.")):
            return reference
        self.diagnostics.append(self._meaningless(reference, scope))
        return None

    def _ambiguous(self, reference: Reference, scope: Scope) -> None:
        what = "an attribute" if str(reference) in scope.names else "a word"
        self.diagnostics.append(
            Diagnostic(
                "ambiguous-name",
                f"`{reference}` is a constant of this file and {what} of the language",
                reference.span,
                help="give the constant another name",
            )
        )

    def _meaningless(self, reference: Reference, scope: Scope) -> Diagnostic:
        name, span = str(reference), reference.span
        if name in _EVERYWHERE or name.startswith(f"{_CONFIG}."):
            message = f"`{name}` has no value in {scope.place}"
            return Diagnostic("name-not-available", message, span)
        known = (*self.constants, *scope.names, *scope.words)
        message = f"`{name}` is not known"
        return Diagnostic("unknown-name", message, span, help=did_you_mean(name, known))

    def _check_calls(self, expr: Expr, scope: Scope) -> None:
        if isinstance(expr, Call):
            self._check_call(expr, scope)
        if isinstance(expr, Array):
            message = "a list is no value here"
            self.diagnostics.append(Diagnostic("wrong-type", message, expr.span))
        for child in children(expr):
            self._check_calls(child, scope)

    def _check_call(self, call: Call, scope: Scope) -> None:
        name = call.function
        if name in scope.words:
            message = f"`{name}` is not supported yet"
            self.diagnostics.append(Diagnostic("not-supported-yet", message, call.span))
            return
        if name not in FUNCTIONS:
            message, help = f"there is no function `{name}`", did_you_mean(name, FUNCTIONS)
            self.diagnostics.append(Diagnostic("unknown-function", message, call.span, help=help))
            return
        for argument in call.arguments:
            if isinstance(argument, Keyword):
                message = f"`{name}` has no argument `{argument.name}`"
                self.diagnostics.append(Diagnostic("wrong-arguments", message, argument.span))
        least, most = FUNCTIONS[name]
        count = len(call.arguments)
        if count < least or (most is not None and count > most):
            message = f"`{name}` takes {'one number' if most else 'at least one number'}"
            label = f"has {count}"
            self.diagnostics.append(Diagnostic("wrong-arguments", message, call.span, label))
