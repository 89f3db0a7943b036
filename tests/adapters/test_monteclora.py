"""`variant = monteclora`: with the same draws as PEFT, and what is drawn and asked of the loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MontecloraConfig
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import Tensor, nn
from torch.distributions import Dirichlet, MultivariateNormal, Wishart, kl_divergence

import lora_fx
from lora_fx.adapters.peft.keys import live_tensors
from lora_fx.graph.monteclora import divergence, mixture, variances
from lora_fx.runtime.auxiliary_loss import auxiliary_loss
from tests.adapters.kinds import PREFIX, Kind, by_peft, of, ours, scatter, state_of
from tests.architectures import LAYERS
from tests.dense import relative
from tests.example_inputs import example_inputs
from tests.runtime.test_combine import loaded_by_peft
from tests.runtime.test_merge import logits
from tests.tiny import graphs, llama, step, tokens

TARGETS = ["q_proj", "down_proj"]
SETTINGS = {"num_samples": 4, "sample_scaler": 0.3, "kl_loss_weight": 0.1}
MONTE = "variant = monteclora(num_samples = 4, sample_scaler = 0.3, kl_loss_weight = 0.1)"
KIND = Kind(
    of("llama"),
    f"{MONTE} target {', '.join(TARGETS)}",
    {"target_modules": TARGETS, "monteclora_config": MontecloraConfig(**SETTINGS)},
)


def trained(model: Any, seed: int = 5) -> dict[str, Tensor]:
    """Logits and gradients of a step without what is added to the loss."""
    model.train().zero_grad()
    torch.manual_seed(seed)
    result = model(**example_inputs(model))
    result.logits.float().square().mean().backward()
    live = {n: t for n, t in live_tensors(model, "default").items() if t.requires_grad}
    grads = {f"{PREFIX}{name}": tensor.grad.clone() for name, tensor in live.items()}
    return {"logits": result.logits.detach(), **grads}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert tensor.norm() > 0, key
        assert relative(got[key], tensor) < tolerance, key


def give_draws(model: nn.Module, seed: int, widths: dict[str, int]) -> None:
    """Let PEFT's samplers draw what our sites draw, one after the other."""
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, MontecloraSampler):
            Z = torch.randn(4, 3, widths[name.split(".")[-3]], dtype=torch.float64)
            X, z = (torch.randn(size, dtype=torch.float64) for size in ((3, 3), (4,)))
            one = {"z_mvn": Z.transpose(1, 2), "z_wishart": X.T @ X, "z_dirichlet": z}
            module.sampler.get = lambda one=one: one


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_step_as_peft_with_the_same_draws(backend: str | None) -> None:
    model = ours(KIND, backend)
    theirs: Any = by_peft(KIND, state_of(model)).double().train()
    model.double()  # the priors' gradients are what is left of larger numbers
    give_draws(theirs, 5, {"q_proj": 32, "down_proj": 44})
    got = trained(model)
    result = theirs(**example_inputs(theirs.get_base_model()))
    result.logits.square().mean().backward()
    grads = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    want = {"logits": result.logits, **{n: g for n, g in grads.items() if g is not None}}
    assert len([name for name in want if "prior" in name]) == 2 * 2 * LAYERS
    assert_same(got, want)
    assert relative(got["logits"], trained(model, 6)["logits"]) > 1e-3
    plain = logits(model.eval())
    assert relative(plain, got["logits"]) > 1e-3
    with torch.no_grad():
        assert relative(theirs.eval()(tokens()).logits, model(tokens()).logits) < 1e-7


@pytest.mark.parametrize("unit", ["layers", "model"])
def test_rewritten(unit: str) -> None:
    assert_same(trained(ours(KIND, "eager", unit)), trained(ours(KIND)))


def test_inductor_draws_too() -> None:
    model, plain = ours(KIND, "inductor"), ours(KIND)
    one, other = trained(model, 5), trained(model, 6)
    assert relative(one["logits"], other["logits"]) > 1e-3
    assert_same(trained(model, 5), one)
    mean = sum((trained(model, i)["logits"] for i in range(20)), torch.zeros(())) / 20
    assert relative(mean, logits(plain.eval())) < relative(one["logits"], logits(plain))
    assert relative(model.eval()(tokens()).logits, plain(tokens()).logits) < 1e-5


def test_gradients_against_finite_differences() -> None:
    text = f"lora 1 adapter default {{ rank = 2 {MONTE} target linear }}"
    model: Any = lora_fx.compile(nn.Sequential(nn.Linear(5, 7)), text, backend=None).double()
    scatter(model)
    x = torch.randn(3, 5).double()

    def loss() -> Tensor:
        torch.manual_seed(3)
        return model.train()(x).square().sum() + model.auxiliary_loss()

    loss().backward()
    values = [t for t in live_tensors(model, "default").values() if t.requires_grad]
    assert len(values) == 4
    for tensor in values:
        place, ends = (0,) * tensor.dim(), []
        for sign in (1, -1):
            with torch.no_grad():
                tensor[place] += sign * 1e-6
                ends.append(loss().item())
                tensor[place] -= sign * 1e-6
        assert tensor.grad[place].abs() > 1e-4
        assert abs((ends[0] - ends[1]) / 2e-6 - tensor.grad[place].item()) < 1e-4


def test_the_divergence_is_that_of_torch_s_distributions() -> None:
    torch.manual_seed(0)
    std, prior, v = torch.randn(3).double(), torch.randn(4).double(), torch.rand(3).double() + 0.1
    one = torch.eye(3).double()
    want = kl_divergence(Dirichlet(prior.exp()), Dirichlet(torch.full((4,), 0.1).double()))
    own, base = Wishart(3.0, (2 * std).exp().diag()), Wishart(3.0, one)
    want = want + kl_divergence(own, base)
    zero = torch.zeros(3).double()
    normal = kl_divergence(MultivariateNormal(zero, v.diag()), MultivariateNormal(zero, one))
    assert relative(divergence(std, prior, v, 0.1), want + 4 * normal) < 1e-6
    assert divergence(std * 0, torch.full((4,), 0.1).double().log(), one.diag(), 0.1).abs() < 1e-6


def test_what_is_drawn_is_distributed_as_peft_s() -> None:
    torch.manual_seed(0)
    std, prior = torch.randn(3) / 4, torch.randn(4)
    sampler = MontecloraSampler(5, 3, 4, buffer_size=1, device="cpu")
    sampler.std_prior.data, sampler.expert_weights_prior.data = std, prior
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(4000):
        sampler()
        found.append((sampler.gaussian_var_prior.diag().detach(), sampler.expert_weights.detach()))
    theirs = [torch.stack(column) for column in zip(*found, strict=True)]
    drawn = [(variances(std, 3), mixture(prior, 4)) for _ in range(4000)]
    mine = [torch.stack(column) for column in zip(*drawn, strict=True)]
    for got, want in zip(mine, theirs, strict=True):
        assert relative(got.mean(0), want.mean(0)) < 0.08
        assert relative(got.std(0), want.std(0)) < 0.12
    assert (mine[1].sum(1) - 1).abs().max() < 1e-5


def test_the_loss_has_the_mean_divergence_in_it() -> None:
    model = ours(KIND).train()
    inputs = example_inputs(model)
    torch.manual_seed(3)
    with_it = model(**inputs).loss
    torch.manual_seed(3)
    with torch.no_grad():
        without = model(**inputs).loss
    extra = [model.auxiliary_loss().detach() for _ in range(300)]
    mean = torch.stack(extra).mean()
    assert mean > 0.05
    assert abs(with_it - without - mean) < 0.5 * mean + 3 * torch.stack(extra).std()
    assert model.eval()(**inputs).loss.item() == pytest.approx(model(**inputs).loss.item())
    plan = model.lora_fx_adapters["default"]
    assert auxiliary_loss(model, [plan]).grad_fn is not None
    with model.disable_adapter():
        assert model.auxiliary_loss() is None


def test_entropy_is_added_if_asked_for() -> None:
    quiet = MONTE.replace("kl_loss_weight = 0.1", "kl_loss_weight = 0")
    asked = quiet.replace(")", ", use_entropy = true)")
    with_it = ours(Kind(KIND.base, f"{asked} target q_proj", {}))
    without = ours(Kind(KIND.base, f"{quiet} target q_proj", {}))
    assert without.auxiliary_loss() == 0
    assert 0.25 < with_it.auxiliary_loss() < 1  # Σ wₙ², between 1/n and 1


def test_saved_and_loaded_by_us_and_by_peft(tmp_path: Path) -> None:
    text = f"lora 1 adapter default {{ rank = 3 alpha = 5 {MONTE} target q_proj, up_proj }}"
    model: Any = lora_fx.compile(llama(2), text, backend=None).eval()
    scatter(model)
    want = logits(model)
    model.save_pretrained(tmp_path / "ours")
    theirs: Any = loaded_by_peft(tmp_path / "ours", llama(2))
    assert theirs.peft_config["default"].monteclora_config.num_samples == 4
    with torch.no_grad():
        assert relative(theirs(tokens()).logits, model(tokens()).logits) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        base = llama(2)
        loaded: Any = lora_fx.load(tmp_path / name, base, backend=None, is_trainable=True)
        assert relative(logits(loaded.eval()), want) < 1e-6
        assert relative(logits(base.eval()), want) > 1e-3
        known = model.get_adapter_state_dict()
        again = loaded.get_adapter_state_dict()
        assert known.keys() == again.keys()
        assert len([key for key in known if "monteclora" in key]) == 4 * 4
        assert all(torch.equal(known[key], again[key]) for key in known)
        assert_same(trained(loaded), trained(model))
        model.eval()


def test_merged_is_plain_lora() -> None:
    model = ours(KIND, "eager").eval()
    want = logits(model)
    model.merge_adapter()
    assert relative(logits(model), want) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    model.add_weighted_adapter(["default"], [1.0], "new", "linear")
    model.set_adapter("new")
    assert relative(logits(model), want) < 1e-5


def test_no_graph_is_made_by_steps_and_the_plan_counts_the_priors() -> None:
    model = ours(KIND, "eager")
    step(model.train(), tokens(2, 11))
    made = graphs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        step(model, tokens(2, 11))
        optimizer.step()
    assert graphs() == made
    sites = model.lora_fx_adapters["default"].sites
    trained_ones = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(site.trained for site in sites) == sum(trained_ones)


def test_checkpointed_layers_draw_the_same_again() -> None:
    text = f"lora 1 adapter default {{ rank = 3 alpha = 5 {MONTE} target q_proj, down_proj }}"
    found = []
    for settings in ("", "compile { checkpoint = layers }"):
        model: Any = lora_fx.compile(llama(2), f"{text} {settings}", backend="eager")
        scatter(model)
        found.append(trained(model))
    assert_same(found[1], found[0])


def test_peft_s_loss_has_the_wrong_sign_in_it() -> None:
    """The second term of a Dirichlet's divergence is subtracted, not added: a bug of PEFT's."""
    sampler = MontecloraSampler(5, 3, 4, buffer_size=1, device="cpu", dirichlet_prior=0.1)
    alpha, other = torch.tensor([0.3, 1.2, 2.0, 0.7]), torch.full((4,), 0.1)
    right = kl_divergence(Dirichlet(alpha), Dirichlet(other))
    wrong = sampler.dirichlet_kl(alpha)
    apart = 2 * (alpha.lgamma() - other.lgamma()).sum()
    assert relative(wrong - apart, right) < 1e-5


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (f"lora_bias = true {MONTE} target q_proj", "`lora_bias` and variant `monteclora`"),
        (f"init = pissa {MONTE} target q_proj", "init `pissa` and variant `monteclora`"),
        (f"{MONTE} target embed_tokens", "has no variant `monteclora`"),
        (f"{MONTE} target q_proj target v_proj {{ variant = lora }}", "at some modules of an"),
    ],
)
def test_what_is_refused(adapter: str, message: str) -> None:
    with pytest.raises(lora_fx.LoraFxError, match=message):
        lora_fx.compile(llama(2), f"lora 1 adapter default {{ {adapter} }}", backend=None)
