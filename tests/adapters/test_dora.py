"""DoRA: several adapters at once, at some targets only, its start, and what is refused."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.peft.keys import adapter_tensors, live_tensors
from lora_fx.adapters.sites.magnitudes import effective_delta, oriented_weight
from tests.adapters.kinds import scatter
from tests.adapters.varied import IDS, compiled
from tests.dense import relative
from tests.odd_models import Varied

SEVERAL = """lora 1
adapter one { rank = 2  variant = dora  init = random  target up, mix, embed }
adapter two { rank = 3  variant = dora  scaling = 1.7  init = random  target up, mix }
adapter low { rank = 1  scaling = -2  init = random  target up, embed }
"""
SOME = "variant = dora  target up, embed  target mix { variant = lora }"


def several(backend: str | None) -> nn.Module:
    base = Varied().eval()
    base.head = nn.Linear(6, 11, bias=False)
    model = lora_fx.compile(base, SEVERAL, backend=backend)
    for name in ("one", "two", "low"):
        scatter(model, name)
    return model


@torch.no_grad()
def dense(model: nn.Module, active: tuple[str, ...]) -> Tensor:
    """The base in float64, with each weight what the sum of the effective deltas makes it."""
    base = Varied().eval()
    base.head = nn.Linear(6, 11, bias=False)
    base.load_state_dict(
        {n: t for n, t in model.state_dict().items() if not storage.is_of_adapters(n)}
    )
    base.double()
    for fqn, site in storage.sites(model):
        weight = base.get_submodule(fqn).weight
        turned = not isinstance(site, nn.Linear)
        W = (weight.t() if turned else weight).clone()
        total = W.clone()
        for name in set(active) & site.lora_branches.keys():
            tensors = [t.double() for t in storage.tensors(site, name).values()]
            A, B = tensors[:2]
            own = W + site.lora_arithmetic[name].scaling * B @ A
            if len(tensors) > 2:
                own = own * (tensors[2] / own.norm(dim=1))[:, None]
            total += own - W
        weight.copy_(total.t() if turned else total)
    return base(IDS)


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
@pytest.mark.parametrize("active", [("one",), ("one", "two"), ("low", "two", "one")])
def test_a_mix_is_the_sum_of_effective_deltas(active: tuple[str, ...], backend: str | None) -> None:
    model = several(backend)
    for order in permutations(active) if backend is None else [active]:
        model.set_adapter(order)
        assert relative(model(IDS), dense(model, active)) < 2e-6
    assert relative(dense(model, active[:-1]), dense(model, active)) > 1e-2


@pytest.mark.parametrize("name", ["one", "low"])
def test_the_effective_delta_of_a_site(name: str) -> None:
    model = several(None)
    for fqn in ("up", "mix", "embed"):
        site = model.get_submodule(fqn)
        if name in site.lora_branches:
            A, B, *m = (t.double() for t in storage.tensors(site, name).values())
            W = oriented_weight(site).double()
            want = W + site.lora_arithmetic[name].scaling * B @ A
            if m:
                want = want * (m[0] / want.norm(dim=1))[:, None]
            got = effective_delta(site, name)
            assert relative(got, want - W) < 1e-6
            assert got.norm() > 0.1


@pytest.mark.parametrize("init", ["default", "random"])
def test_it_starts_as_lora(init: str) -> None:
    """With the norms of W + s B A as magnitudes, of each row of zeros too."""
    models = []
    for variant in ("dora", "lora"):
        base = Varied().eval()
        with torch.no_grad():
            base.up.weight[2] = 0
        text = f"""lora 1 adapter default {{
            rank = 2  init = {init}  variant = {variant}  target up, mix, embed
        }}"""
        models.append(lora_fx.compile(base, text, backend=None))
    dora, lora = (model(IDS) for model in models)
    assert dora.isfinite().all()
    assert relative(dora, lora) < 1e-6
    assert (relative(lora, base(IDS)) > 1e-2) == (init == "random")


def test_magnitudes_are_in_the_dtype_that_is_asked_for() -> None:
    model = compiled("variant = dora  dtype = bfloat16  target up", None)
    assert {t.dtype for t in live_tensors(model, "default").values()} == {torch.bfloat16}
    assert model.up.lora_magnitude_vector["default"].weight.requires_grad
    frozen = compiled("variant = dora  trainable = false  target up", None)
    assert not any(t.requires_grad for t in live_tensors(frozen, "default").values())


def peft_of(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(Varied().eval(), folder).eval()


@pytest.mark.filterwarnings("ignore")
def test_at_some_targets_it_is_the_same_in_peft(tmp_path: Path) -> None:
    model = compiled(SOME, None).eval()
    model.save_adapters(tmp_path)
    assert relative(peft_of(tmp_path)(IDS), model(IDS)) < 1e-6
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("magnitude" in key for key in saved) == 3
    again = lora_fx.load(tmp_path, Varied().eval(), backend=None)
    assert relative(again(IDS), model(IDS)) < 1e-6
    scatter(again)
    model.load_adapter(tmp_path)
    again.save_adapters(tmp_path)
    before = model(IDS)
    with pytest.raises(lora_fx.LoraFxError, match=r"mix\.lora_magnitude_vector` has been trained"):
        model.load_adapter(tmp_path)
    assert torch.equal(model(IDS), before)


@pytest.mark.filterwarnings("ignore")
def test_both_forms_of_the_key_are_read(tmp_path: Path) -> None:
    settings = {"r": 2, "target_modules": ["up", "mix"], "use_dora": True}
    theirs = get_peft_model(Varied().eval(), LoraConfig(**settings, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    names = [key for key in saved if key.endswith(".lora_magnitude_vector")]
    assert len(names) == 2
    first = lora_fx.load(tmp_path, Varied().eval(), backend=None)(IDS)
    save_file({f"{k}.weight" if k in names else k: 2 * t for k, t in saved.items()}, path)
    second = lora_fx.load(tmp_path, Varied().eval(), backend=None)
    assert relative(second(IDS), first) > 1e-2
    own = adapter_tensors(second, "default")
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[key], 2 * tensor) for key, tensor in saved.items())


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("tie = true  target embed", "variant `dora` and `tie` do not go together"),
        (
            "target mix  target embed { variant = lora  tie = true }",
            "variant `dora` in an adapter with the tied embedding `embed` cannot be compiled yet",
        ),
        ("lora_bias = true  target up", "`lora_bias` and variant `dora` do not go together"),
    ],
)
def test_what_does_not_go_together(adapter: str, message: str) -> None:
    with pytest.raises(lora_fx.LoraFxError, match=message):
        compiled(f"variant = dora  {adapter}", None)
