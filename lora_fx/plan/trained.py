"""What an adapter trains of the base model itself: whole modules, rows of embeddings, biases."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.plan.alike import once_each
from lora_fx.plan.modules import Modules, input_embedding
from lora_fx.plan.selectors import Selection, is_inside, match
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.evaluate import evaluate, no_environment
from lora_fx.spec.expressions import Value, Word, references
from lora_fx.spec.spec import AdapterSpec, Tokens, Train

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class TrainedModule:
    """A module of which an adapter trains a full copy, with the modules inside it.

    With `tie` modules that share a weight with it share the copy.
    """

    fqn: str
    adapter: str
    parameters: int
    trainable: bool
    tie: bool
    rule: Span


@dataclass(frozen=True)
class TrainedTokens:
    """Rows `ids` of an embedding, `width` wide, that an adapter trains."""

    fqn: str
    adapter: str
    ids: tuple[int, ...]
    width: int
    trainable: bool
    rule: Span

    @property
    def parameters(self) -> int:
        """Elements of the rows."""
        return len(self.ids) * self.width


@dataclass(frozen=True)
class TrainedBias:
    """A bias of the base model, by its dotted name, that an adapter trains."""

    name: str
    adapter: str
    parameters: int
    trainable: bool
    rule: Span


def trained_modules(
    adapter: AdapterSpec,
    selections: Sequence[Selection],
    modules: Modules,
    diagnostics: list[Diagnostic],
) -> list[TrainedModule]:
    """Return the modules of the `train` statements; of one inside another only the outer one."""
    pairs = zip(adapter.trains, selections, strict=True)
    rules = {fqn: train for train, selection in pairs for fqn in selection.names}
    found: dict[str, TrainedModule] = {}
    faults = []
    for fqn in (f for f in (*modules.by_fqn, *modules.parameters) if f in rules):
        train = rules[fqn]
        module = modules.by_fqn.get(fqn)
        fault = _untrainable(fqn, module, train)
        if fault is not None:
            faults.append(fault)
        elif module is not None and not is_inside(fqn, found):
            size = sum(parameter.numel() for parameter in module.parameters())
            flags = is_trainable(adapter), _constant(adapter, "tie") is True
            found[fqn] = TrainedModule(fqn, adapter.name, size, *flags, train.span)
    diagnostics += once_each(faults)
    return list(found.values())


def _untrainable(fqn: str, module: nn.Module | None, train: Train) -> Diagnostic | None:
    help = "name the modules inside it, or one around it"
    if module is None:
        message, help = "`train` is about modules, not single parameters", "name the module"
    elif isinstance(module, _CONTAINERS):
        message = f"a `{type(module).__name__}` is never called, so that no copy of it would be"
    elif not any(True for _ in module.parameters()):
        message = f"`{type(module).__name__}` modules have no parameters to train"
    else:
        return None
    label, span = f"matches `{fqn}`", train.selector.span
    severity = "note" if train.optional and module is not None else "error"
    return Diagnostic("untrainable-module", message, span, label, help=help, severity=severity)


def trained_tokens(
    adapter: AdapterSpec,
    modules: Modules,
    copies: Iterable[TrainedModule],
    diagnostics: list[Diagnostic],
) -> list[TrainedTokens]:
    """Return the rows of the `tokens` statements, one entry for each embedding."""
    found: dict[str, TrainedTokens] = {}
    whole = {copy.fqn for copy in copies}
    for tokens in adapter.tokens:
        try:
            for fqn in _embeddings(tokens, modules):
                rows = _rows(fqn, tokens, adapter, modules, whole)
                if fqn in found:
                    first = ((found[fqn].rule, "the first one"),)
                    message = f"the tokens of `{fqn}` are listed twice"
                    fault = Diagnostic("duplicate-statement", message, tokens.span, secondary=first)
                    raise LoraFxError((fault,))
                found[fqn] = rows
        except LoraFxError as error:
            diagnostics += error.diagnostics
    return list(found.values())


def _embeddings(tokens: Tokens, modules: Modules) -> list[str]:
    if tokens.atom is not None:
        matched = match(tokens.atom, modules)
        if not matched:
            message = f"`{tokens.atom}` matches no module of the model"
            raise LoraFxError((Diagnostic("unmatched-target", message, tokens.atom.span),))
        return matched
    inputs = input_embedding(modules.tree)
    found = [fqn for fqn, module in modules.by_fqn.items() if module is inputs]
    if not found:
        message = "the model does not say which embedding its tokens enter by"
        help = "name it: `tokens […] in embed_tokens`"
        raise LoraFxError((Diagnostic("no-embedding", message, tokens.span, help=help),))
    return found


def _rows(
    fqn: str, tokens: Tokens, adapter: AdapterSpec, modules: Modules, whole: Container[str]
) -> TrainedTokens:
    module = modules.by_fqn[fqn]
    if not isinstance(module, nn.Embedding):
        message = "only the rows of an embedding can be trained"
        label = f"`{fqn}` is a `{type(module).__name__}`"
        raise LoraFxError((Diagnostic("no-embedding", message, tokens.span, label),))
    if is_inside(fqn, whole):
        message = f"`{fqn}` is trained as a whole already"
        raise LoraFxError((Diagnostic("cannot-apply", message, tokens.span),))
    beyond = [token for token in tokens.ids if token >= module.num_embeddings]
    if beyond:
        message = f"there is no token {beyond[0]}"
        label = f"`{fqn}` has {module.num_embeddings} rows"
        raise LoraFxError((Diagnostic("token-range", message, tokens.span, label),))
    width, trainable = module.embedding_dim, is_trainable(adapter)
    return TrainedTokens(fqn, adapter.name, tokens.ids, width, trainable, tokens.span)


def trained_biases(
    adapter: AdapterSpec,
    sites: Iterable[SitePlan],
    modules: Modules,
    copies: Iterable[TrainedModule],
) -> list[TrainedBias]:
    """Return the biases of `bias = all`, or with `lora_only` those of the adapted modules."""
    setting, which = adapter.settings.get("bias"), bias_of(adapter)
    if setting is None or which == "none":
        return []
    adapted = {site.fqn for site in sites}
    whole = {copy.fqn for copy in copies}
    return [
        TrainedBias(name, adapter.name, parameter.numel(), is_trainable(adapter), setting.span)
        for name, parameter in modules.parameters.items()
        if name.rpartition(".")[2] == "bias"
        and (which == "all" or name.rpartition(".")[0] in adapted)
        and not is_inside(name, whole)
    ]


def bias_of(adapter: AdapterSpec) -> str:
    """Return the spec's word for which biases an adapter trains: `none`, `all`, `lora_only`."""
    word = _constant(adapter, "bias")
    return word.name if isinstance(word, Word) else "none"


def is_trainable(adapter: AdapterSpec) -> bool:
    """Whether what an adapter has of the base is trained; with `weights` only if it says so.

    A `trainable` that depends on the module is about its sites.
    """
    if "trainable" not in adapter.settings:
        return "weights" not in adapter.settings
    return _constant(adapter, "trainable") is not False


def _constant(adapter: AdapterSpec, name: str) -> Value | None:
    setting = adapter.settings.get(name)
    if setting is None or any(references(setting.value)):
        return None
    return evaluate(setting.value, no_environment)
