"""The task for which an adapter is, as PEFT names it."""

from torch import nn

from lora_fx.adapters import storage
from lora_fx.plan.rules import AdapterPlan
from lora_fx.spec.peft.matching import saved_modules, trained

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_of(model: nn.Module, plan: AdapterPlan) -> str | None:
    """Return the `task_type` by which PEFT makes the same of a folder as without one, or None.

    To classify or to answer questions PEFT trains the model's head: that is the task of an adapter
    that trains the head as a whole. PEFT's models for a text to a text take token ids alone.
    """
    name = type(model).__name__
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    if task == "SEQ_2_SEQ_LM" and not _is_text_to_text(model):
        return None
    heads = {
        fqn
        for suffix in saved_modules({"task_type": task})
        for fqn in trained(suffix, storage.base_modules(model))
    }
    needs_head = bool(saved_modules({"task_type": task}))
    if needs_head and (not heads or not heads <= {module.fqn for module in plan.modules}):
        return None
    return task


def _is_text_to_text(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    by_ids = getattr(model, "main_input_name", None) == "input_ids"
    return by_ids and bool(getattr(config, "is_encoder_decoder", False))
