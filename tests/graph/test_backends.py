"""What is used of torch's hand-over to Inductor."""

import torch

from lora_fx.graph import backends


def compiled_by(run, *inputs: torch.Tensor) -> torch.Tensor:
    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b).tanh()

    torch.compiler.reset()
    return torch.compile(function, backend=run, fullgraph=True)(*inputs)


def test_inductor_compiles_forward_and_backward() -> None:
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    got = compiled_by(lambda g, i: backends.inductor(g, i, "default"), a, b)
    want = (a @ b).tanh()
    assert torch.allclose(got, want, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), a)[0] for y in (got, want)]
    assert torch.allclose(*grads, atol=1e-5)


def test_passes_see_the_aten_graph_of_each_direction() -> None:
    seen: list[list[str]] = []

    def look(graph) -> int:
        seen.append([str(n.target) for n in graph.nodes if n.op == "call_function"])
        return 0

    look.__name__ = f"look_{id(seen)}"  # known to no cache
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    compiled_by(lambda g, i: backends.inductor(g, i, "default", (look,)), a, b).sum().backward()
    forward, backward = seen
    assert forward[:2] == ["aten.mm.default", "aten.tanh.default"]
    assert "aten.mm.default" in backward
    assert "aten.tanh.default" not in backward


def test_modes_have_options() -> None:
    import torch._inductor

    assert torch._inductor.list_mode_options("max-autotune-no-cudagraphs")["max_autotune"] is True


def test_eager_runs_the_graph_itself() -> None:
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return backends.eager(graph)

    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert torch.equal(compiled_by(backend, a, b), (a @ b).tanh())
    assert len(seen) == 1
