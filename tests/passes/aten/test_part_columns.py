"""Gradients that lie side by side are results whose memory is laid out as parameters' are."""

import pytest
import torch
from torch import Tensor

import lora_fx
from lora_fx.passes.aten.part_columns import part_columns
from lora_fx.rules import gather_samples
from tests.passes.aten.on_gpu import operators, rewritten, traced
from tests.tiny import llama, tokens

GIVEN = [torch.randn(7, 5), torch.randn(5, 12)]


def side_by_side(tangents, h):
    dB = torch.mm(tangents, h)
    return dB[:, :4], dB[:, 8:], h * 2, dB[:, 4:8]


def test_the_results_are_the_same_and_contiguous() -> None:
    graph = rewritten(part_columns, traced(side_by_side, *GIVEN))
    assert operators(graph).count("clone") == 1
    got, want = graph(*GIVEN), side_by_side(*GIVEN)
    assert all(map(torch.equal, got, want))
    assert all(part.is_contiguous() for part in got)
    assert not want[0].is_contiguous()


def test_what_else_reads_a_part_reads_it_as_before() -> None:
    def read(tangents, h):
        first, *others = side_by_side(tangents, h)
        return first, first.sum(), *others

    graph = rewritten(part_columns, traced(read, *GIVEN))
    assert operators(graph).count("slice.Tensor") == 1
    assert all(map(torch.equal, graph(*GIVEN), read(*GIVEN)))


def of_other_widths(tangents, h):
    dB = torch.mm(tangents, h)
    return dB[:, :4], dB[:, 4:]


def in_between(tangents, h):
    dB = torch.mm(tangents, h)
    return dB[:, 2:6], dB[:, 6:10]


def one_alone(tangents, h):
    return torch.mm(tangents, h)[:, :4]


def rows(tangents, h):
    dA = torch.mm(tangents, h)
    return dA[:3], dA[3:6]


def read_by_others(tangents, h):
    dB = torch.mm(tangents, h)
    return dB[:, :6], dB[:, 6:], dB.sum()


def of_a_forward_pass(x, h):
    y = torch.mm(x, h)
    return y[:, :6], y[:, 6:]


def no_results(tangents, h):
    dB = torch.mm(tangents, h)
    return dB[:, :6] + dB[:, 6:]


@pytest.mark.parametrize(
    "function",
    [
        of_other_widths,
        in_between,
        one_alone,
        rows,
        read_by_others,
        of_a_forward_pass,
        no_results,
    ],
)
def test_what_is_left_alone(function) -> None:
    rewritten(part_columns, traced(function, *GIVEN), made=0)


@pytest.mark.parametrize("applied", [True, False])
def test_autograd_keeps_them(monkeypatch: pytest.MonkeyPatch, applied: bool) -> None:
    """A gradient that is part of a larger tensor has not been copied."""
    monkeypatch.setattr(gather_samples, "is_gathered", lambda *_: False)
    if not applied:
        monkeypatch.setattr("lora_fx.compiler.pipeline.PLAIN", ())
    spec = "\n".join(f"adapter {n} {{ rank = 4 init = random target q_proj }}" for n in "abc")
    model = lora_fx.compile(llama(1), f"lora 1\n{spec}\nroute {{ train = true }}").train()
    names = ["a", "b", "c"]
    model(input_ids=tokens(3), adapter_names=names).logits.square().mean().backward()

    def kept(gradient: Tensor) -> bool:
        return gradient.untyped_storage().nbytes() > gradient.nbytes

    of_B = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert [kept(gradient) for gradient in of_B] == [applied] * 3
