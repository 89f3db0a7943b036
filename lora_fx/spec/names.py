"""What the names inside an expression stand for, which depends on where it is written."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_fx.diagnostics import Diagnostic
from lora_fx.spec.closest import did_you_mean
from lora_fx.spec.evaluate import FUNCTIONS
from lora_fx.spec.expressions import (
    Call,
    Expr,
    Keyword,
    Literal,
    Reference,
    Value,
    Word,
    children,
    results,
    substitute,
)
from lora_fx.spec.other_words import other_value
from lora_fx.spec.rule import Rule
from lora_fx.spec.scopes import CONFIG, EVERYWHERE, Scope
from lora_fx.spec.value_help import help_for_word


@dataclass
class Names:
    """The constants of a file, and what was found wrong while looking names up."""

    constants: Mapping[str, Value | None]
    diagnostics: list[Diagnostic] = field(default_factory=list)

    def resolve(
        self, expr: Expr, scope: Scope, wanted: tuple[str, Rule] | None = None
    ) -> Expr | None:
        """Return the expression with constants and words in place; None if a name has no meaning.

        `wanted` is the attribute whose value it is, and what that may be. None without a diagnostic
        stands for a constant that is itself at fault.
        """
        found = len(self.diagnostics)
        failed = False
        values = list(results(expr))

        def leaf(reference: Reference) -> Expr:
            nonlocal failed
            value = self._value(reference, scope, wanted if reference in values else None)
            failed = failed or value is None
            return value or reference

        self._check_calls(expr, scope)
        resolved = substitute(expr, leaf)
        return None if failed or len(self.diagnostics) > found else resolved

    def _value(
        self, reference: Reference, scope: Scope, wanted: tuple[str, Rule] | None
    ) -> Expr | None:
        name = str(reference)
        if name in self.constants:
            if name in scope.names or name in scope.words:
                self._ambiguous(reference, scope)
            value = self.constants[name]
            return None if value is None else Literal(value, reference.span)
        if name in scope.words:
            return Literal(Word(name), reference.span)
        if name in scope.names or (CONFIG in scope.names and name.startswith(f"{CONFIG}.")):
            return reference
        self.diagnostics.append(self._meaningless(reference, scope, wanted))
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

    def _meaningless(
        self, reference: Reference, scope: Scope, wanted: tuple[str, Rule] | None
    ) -> Diagnostic:
        name, span = str(reference), reference.span
        if name in EVERYWHERE or name.startswith(f"{CONFIG}."):
            message = f"`{name}` has no value in {scope.place}"
            return Diagnostic("name-not-available", message, span)
        message = f"`{name}` is not known"
        return Diagnostic("unknown-name", message, span, help=self._help(name, scope, wanted))

    def _help(self, name: str, scope: Scope, wanted: tuple[str, Rule] | None) -> str | None:
        names = (*self.constants, *scope.names)
        if wanted is not None:
            attribute, rule = wanted
            help = help_for_word(name, rule, names)
            return help or f"`{attribute}` must be {rule.expects}"
        ours = other_value(name)
        if ours in ("true", "false") or ours in scope.words:
            return f"write `{ours}`"
        return did_you_mean(name, (*names, *scope.words))

    def _check_calls(self, expr: Expr, scope: Scope) -> None:
        if isinstance(expr, Call):
            self._check_call(expr, scope)
        for child in children(expr):
            self._check_calls(child, scope)

    def _check_call(self, call: Call, scope: Scope) -> None:
        name = call.function
        if scope.words.get(name):
            return
        if name not in FUNCTIONS:
            known = (*FUNCTIONS, *(word for word, takes in scope.words.items() if takes))
            message = f"there is no function `{name}`"
            help = did_you_mean(name, known) or did_you_mean(name, FUNCTIONS)
            if name in scope.words:
                message, help = f"`{name}` takes no arguments", f"write `{name}` alone"
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
