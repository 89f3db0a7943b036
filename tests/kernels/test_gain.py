import torch

from lora_fx.kernels.gain import gain
from tests.dense import relative


def test_gradients_are_those_of_the_quotient() -> None:
    torch.manual_seed(0)
    m, norms, dgain = torch.randn(5, 1, requires_grad=True), torch.rand(5, 1) + 1, torch.randn(5, 1)
    gain(m, norms).backward(dgain)
    assert torch.equal(gain(m, norms), m / norms - 1)
    assert torch.equal(m.grad, dgain / norms)
    half = m.detach().bfloat16().requires_grad_()
    gain(half, norms).backward(dgain)
    assert half.grad.dtype == torch.bfloat16
    assert relative(half.grad, dgain / norms) < 0.01


def test_fakes_and_gradients_as_torch_checks_them() -> None:
    m, norms = torch.randn(7, requires_grad=True), torch.rand(7) + 1
    torch.library.opcheck(gain, (m, norms))
    torch.library.opcheck(gain, (m.detach().bfloat16().requires_grad_(), norms))
