"""What is wrong with the value of an attribute."""

from lora_fx.diagnostics import Diagnostic
from lora_fx.spec.closest import did_you_mean
from lora_fx.spec.expressions import Call, Expr, Keyword, Value, Word, show
from lora_fx.spec.rule import Rule, Rules, named_arguments
from lora_fx.spec.value_help import help_for_text, help_for_word


def problems(name: str, rule: Rule, value: Value, expr: Expr) -> list[Diagnostic]:
    """Return everything that is wrong with a value of an attribute, written as `expr`."""
    if isinstance(value, Word) and value.name in rule.words:
        return _argument_problems(value, rule.words[value.name], expr)
    if not isinstance(value, Word) and rule.accepts(value):
        return []
    help = None
    if isinstance(value, float) and rule.accepts(round(value)) and expr.span.text != repr(value):
        help = f"write `round({expr.span.text})`"
    elif isinstance(value, Word):
        help = help_for_word(value.name, rule)
    elif isinstance(value, str):
        help = help_for_text(value, rule)
    message = f"`{name}` must be {rule.expects}"
    return [Diagnostic("wrong-value", message, expr.span, f"is {show(value)}", help=help)]


def _argument_problems(word: Word, parameters: Rules, expr: Expr) -> list[Diagnostic]:
    found: list[Diagnostic] = []
    given = named_arguments(parameters, word)
    parts = _parts(expr, parameters)
    if len(given) < len(word.arguments) or "" in given:
        message = f"`{word.name}` has too many arguments, or one twice"
        help = f"it takes {', '.join(f'`{name}`' for name in parameters) or 'none'}"
        found.append(Diagnostic("wrong-arguments", message, expr.span, help=help))
    for name, value in given.items():
        part = parts.get(name, expr)
        if name in parameters:
            found += problems(name, parameters[name], value, part)
        elif name:
            message = f"`{word.name}` has no argument `{name}`"
            help = did_you_mean(name, parameters)
            found.append(Diagnostic("wrong-arguments", message, part.span, help=help))
    for name, rule in parameters.items():
        if rule.required and name not in given:
            message = f"`{word.name}` needs the argument `{name}`"
            help = f"write `{word.name}({name} = …)`; it must be {rule.expects}"
            found.append(Diagnostic("wrong-arguments", message, expr.span, help=help))
    return found


def _parts(expr: Expr, parameters: Rules) -> dict[str, Expr]:
    if not isinstance(expr, Call):
        return {}
    order = iter(parameters)
    return {
        part.name if isinstance(part, Keyword) else next(order, ""): part.value
        if isinstance(part, Keyword)
        else part
        for part in expr.arguments
    }
