"""What torch does with the logger methods that graphs leave out: look up, copy, sort and log."""

import copy
import json
import logging
import pickle

import torch

import lora_fx
from tests.tiny import llama, step, tokens


def test_they_can_be_asked_for_and_logged() -> None:
    step(lora_fx.compile(llama(1), "lora 1 adapter x { target q_proj }", backend="eager"), tokens())
    ignored = torch._dynamo.config.ignore_logger_methods
    method = logging.Logger.warning_once  # type: ignore[attr-defined]
    assert method in ignored
    assert logging.Logger.warning not in ignored
    for same in (copy.deepcopy(ignored), pickle.loads(pickle.dumps(ignored))):
        assert same == ignored
        assert method in same
    assert any("warning_once" in name for name in json.loads(json.dumps(sorted(ignored))))
