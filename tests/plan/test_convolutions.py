"""What is planned of convolutions: sites, shapes, bytes, and what is refused."""

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapters import storage
from tests.adapters.convolutions import CASES
from tests.architectures import ARCHITECTURES, CONVOLUTIONAL
from tests.example_inputs import example_inputs
from tests.plan.activations.test_estimate import kept

SPEC = """lora 1
adapter default {{ rank = 4  {} target class "{}" }}"""


def faults(base: nn.Module, text: str) -> list[str]:
    with pytest.raises(lora_fx.LoraFxError) as caught:
        lora_fx.plan(f"lora 1 {text}", base)
    return [f"{d.code}: {d.message} ({d.label})" for d in caught.value.diagnostics]


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", CASES)
def test_shapes_and_bytes_are_those_of_the_model(name: str, variant: str) -> None:
    case = CASES[name]
    if variant == "dora" and case.groups > 1:
        return
    text = SPEC.format(f"variant = {variant}", case.kind.__name__)
    plan = lora_fx.plan(text, case.layer())
    model = lora_fx.compile(case.layer(), text, backend=None)
    (site,) = plan.sites
    own = storage.tensors(model[0], "default")  # type: ignore[arg-type]
    assert {key: tuple(t.shape) for key, t in own.items()} == dict(site.tensors)
    assert len(own) == (3 if variant == "dora" else 2)
    memory = plan.memory()
    assert memory["adapters"] == sum(t.nbytes for t in own.values())
    assert memory["gradients"] == memory["adapters"]


def test_the_sites_of_a_real_model() -> None:
    """On meta, where only shapes are."""
    with torch.device("meta"):
        base = CONVOLUTIONAL["resnet"]()
    text = SPEC.format("variant = dora", "Conv2d").replace("4", "3")
    plan = lora_fx.plan(text, base)
    assert [s.fqn for s in plan.sites] == [
        fqn for fqn, m in base.named_modules() if isinstance(m, nn.Conv2d)
    ]
    assert {s.layer.kind for s in plan.sites} == {"conv"}
    inputs = example_inputs(CONVOLUTIONAL["resnet"]())
    assert plan.memory()["adapters"] > 0
    model = lora_fx.compile(CONVOLUTIONAL["resnet"](), text, backend="eager")
    model(**inputs).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.nbytes for p in trained) == plan.memory()["gradients"]
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize(
    ("name", "adapter", "message"),
    [
        ("1d, groups", "rank = 3 target", "the rank must be a multiple of the 2 groups (is 3"),
        ("1d, groups", "rank = 4 variant = dora target", "with groups has no variant `dora`"),
        ("2d", "rank = 8 target", "rank 8 is larger than the layer allows"),
        ("2d", "rank = 4 init = mica target", "a convolution has no init `mica`"),
        ("1d, groups", "rank = 4 init = pissa target", "with groups has no init `pissa`"),
        ("2d", "rank = 4 variant = velora target", "a convolution has no variant `velora`"),
        ("2d", "rank = 4 variant = dora lora_bias = true target", "do not go together"),
    ],
)
def test_refused(name: str, adapter: str, message: str) -> None:
    case = CASES[name]
    target = f'class "{case.kind.__name__}"'
    (fault,) = faults(case.layer(), f"adapter a {{ {adapter} {target} }}")
    assert message in fault


@pytest.mark.parametrize("settings", ["", "variant = dora  dropout = 0.1"])
def test_what_a_forward_keeps(settings: str) -> None:
    """Beside the images, which are the caller's."""
    base = ARCHITECTURES["vit"]().train()
    text = f'lora 1 adapter x {{ rank = 3  {settings}  target class "Conv2d" }}'
    inputs = example_inputs(base)
    estimate = lora_fx.plan(text, base).activations(3, 1, compiled=False).bytes
    held = kept(base, text, lambda output: output.loss, **inputs)
    alive = 0 if "dropout" in settings else inputs["pixel_values"].nbytes
    assert estimate == pytest.approx(held + alive, rel=0.02)


def test_merges_of_groups() -> None:
    adapters = """adapter a { rank = 4 target class "Conv1d" }
    adapter b { rank = 2 target class "Conv1d" }"""
    base = CASES["1d, groups"].layer()
    (fault,) = faults(base, f"{adapters} merge m {{ from a into = base }}")
    assert "merge `m` goes into a convolution with groups" in fault
    (fault,) = faults(base, f"{adapters} merge m {{ from a + b  method = cat  rank = svd(3) }}")
    assert "the rank must be a multiple of the 2 groups (is 3 at `0`)" in fault
    assert lora_fx.plan(
        f"lora 1 {adapters} merge m {{ from a + b method = cat rank = svd(4) }}", base
    )


def test_a_weight_that_is_computed() -> None:
    """Of the convolution whose weight transformers normalises."""
    text = 'adapter a { rank = 4 target "wav2vec2.encoder.pos_conv_embed.conv" }'
    (fault,) = faults(CONVOLUTIONAL["wav2vec2"](), text)
    assert fault.startswith("unsupported-layer: the weight of `wav2vec2.encoder.pos_conv_embed")
    assert "is computed from others" in fault
    linear = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)))
    (fault,) = faults(linear, 'adapter a { rank = 2 target "0" }')
    assert "is computed from others" in fault
