"""What PEFT 0.21.2 does wrong, one idea each: that it does, where PEFT can be asked, and we do not.

Attention, stacked parameters and routing have files of their own.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.peft.keys import live_tensors
from tests.adapters.kinds import of, scatter
from tests.dense import relative
from tests.runtime.test_combine import effective, loaded_by_peft
from tests.runtime.test_merge import logits
from tests.tiny import llama, tokens

TWO = """lora 1
adapter one { rank = 3 alpha = 5 init = random target q_proj, up_proj }
adapter two { rank = 2 alpha = 7 init = random target q_proj, down_proj }
"""


def compiled(text: str = TWO, base: nn.Module | None = None) -> Any:
    return lora_fx.compile(base or llama(2), text, backend=None).eval()


def theirs(config: dict[str, Any], base: nn.Module | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base or llama(2), LoraConfig(**config)).eval()


def of_peft(model: Any) -> Tensor:
    return logits(model)


def both_of_peft(folder: Path) -> Any:
    """Our two adapters in PEFT, both active."""
    compiled().save_pretrained(folder)
    model: Any = loaded_by_peft(folder / "one", llama(2), "one")
    model.load_adapter(folder / "two", "two")
    model.base_model.set_adapter(["one", "two"])
    return model.eval()


def test_active_adapters_add_up_with_a_merged_one(tmp_path: Path) -> None:
    model = compiled()
    model.set_adapter(["one", "two"])
    want = logits(model)
    model.merge_adapter("one")
    assert relative(logits(model), want) < 1e-5
    peft = both_of_peft(tmp_path)
    peft.merge_adapter(["one"])
    assert relative(of_peft(peft), want) > 1e-3


def test_disabling_leaves_what_is_merged_merged(tmp_path: Path) -> None:
    model = compiled()
    model.merge_adapter()
    with model.disable_adapter():
        assert relative(logits(model), logits(llama(2).eval())) < 1e-6
    assert model.merged_adapters() == ["one"]
    peft = both_of_peft(tmp_path)
    peft.merge_adapter(["one"])
    with peft.disable_adapter():
        of_peft(peft)
    layers = [module for module in peft.modules() if hasattr(module, "merged_adapters")]
    assert not any(module.merged_adapters for module in layers)


def test_disabling_does_not_make_frozen_adapters_trainable(tmp_path: Path) -> None:
    compiled().save_pretrained(tmp_path)
    model: Any = lora_fx.load(tmp_path / "one", llama(2), backend=None)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())
    peft = loaded_by_peft(tmp_path / "one", llama(2))
    with peft.disable_adapter():
        pass
    assert any(p.requires_grad for p in peft.parameters())


def test_loading_leaves_training_on(tmp_path: Path) -> None:
    model = compiled()
    model.save_pretrained(tmp_path)
    model.train().load_adapter(tmp_path / "two", "three")
    assert all(module.training for module in model.modules())
    peft = loaded_by_peft(tmp_path / "one", llama(2)).train()
    peft.load_adapter(tmp_path / "two", "three")
    assert not peft.training


def test_a_typo_in_a_list_is_an_error() -> None:
    with pytest.raises(lora_fx.LoraFxError, match="q_porj"):
        compiled("lora 1 adapter a { target q_proj, q_porj }")
    theirs({"target_modules": ["q_proj", "q_porj"]})


def test_a_typo_in_what_is_trained_is_an_error() -> None:
    with pytest.raises(lora_fx.LoraFxError, match="normm"):
        compiled("lora 1 adapter a { target q_proj train normm }")
    theirs({"target_modules": ["q_proj"], "modules_to_save": ["normm"]})


def test_a_name_is_no_ending_of_another() -> None:
    with pytest.raises(lora_fx.LoraFxError, match="head"):
        compiled("lora 1 adapter a { target q_proj train head }")
    peft = theirs({"target_modules": ["q_proj"], "modules_to_save": ["head"]})
    assert any("lm_head.modules_to_save" in name for name, _ in peft.named_parameters())


def test_merging_an_unknown_adapter_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(lora_fx.LoraFxError, match="no adapter `typo`"):
        compiled().merge_adapter(["typo"])
    both_of_peft(tmp_path).merge_adapter(["typo"])


@pytest.mark.parametrize("name", ["train", "keys", "update"])
def test_names_that_modules_have_are_refused_before_anything_is_done(
    name: str, tmp_path: Path
) -> None:
    model = compiled()
    model.save_pretrained(tmp_path)
    before = {n: id(p) for n, p in model.named_parameters()}
    with pytest.raises(lora_fx.LoraFxError, match="cannot name an adapter"):
        model.load_adapter(tmp_path / "two", name)
    assert {n: id(p) for n, p in model.named_parameters()} == before


def test_a_short_name_freezes_nothing_else(tmp_path: Path) -> None:
    model = compiled()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "w", "cat")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert trained
    peft = both_of_peft(tmp_path)
    peft.base_model.set_adapter("one")
    peft.add_weighted_adapter(["one", "two"], [1.0, 1.0], "w", combination_type="cat")
    assert not any(p.requires_grad for p in peft.parameters())


def test_a_folder_that_cannot_be_loaded_leaves_nothing_behind(tmp_path: Path) -> None:
    compiled(
        "lora 1 adapter default { rank = 3 target q_proj, up_proj }", llama(3)
    ).save_pretrained(tmp_path)
    model = compiled()
    before = {n: (id(t), t.clone()) for n, t in model.state_dict().items()}
    with pytest.raises(lora_fx.LoraFxError):
        model.load_adapter(tmp_path, "three")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) for n, (_, t) in before.items())
    assert list(model.lora_fx_adapters) == ["one", "two"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_puts_back_the_very_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = compiled(base=llama(2).to(dtype))
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    peft = loaded_by_peft_in(dtype, tmp_path)
    weight = peft.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    old = weight.clone()
    peft.merge_adapter()
    peft.unmerge_adapter()
    assert not torch.equal(weight, old)


def loaded_by_peft_in(dtype: torch.dtype, folder: Path) -> Any:
    compiled().save_pretrained(folder)
    return loaded_by_peft(folder / "one", llama(2).to(dtype), "one")


def test_safe_and_unsafe_merges_are_one_merge() -> None:
    found = []
    for safe in (True, False):
        model = compiled(base=llama(2).to(torch.bfloat16))
        model.merge_adapter(safe_merge=safe)
        found.append(logits(model))
    assert torch.equal(*found)


def test_steps_leave_the_base_as_it_is() -> None:
    model = compiled().train()
    base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(20):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items())


def test_olora_on_a_transposed_weight_starts_as_the_base() -> None:
    text = "lora 1 adapter a { rank = 3 init = olora target c_attn, c_fc }"
    base = of("gpt2")().eval()
    model: Any = compiled(text, base)
    assert relative(logits(model), logits(base)) < 1e-5
    scatter(model, "a")
    assert relative(logits(model), logits(base)) > 1e-3
    peft = theirs({"target_modules": ["c_attn"], "init_lora_weights": "olora"}, of("gpt2")())
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        logits(peft)


def test_pissa_in_bfloat16_is_nearer_to_the_base_than_peft_s() -> None:
    base = llama(2).to(torch.bfloat16).eval()
    want = logits(llama(2).eval())
    settings = {"r": 3, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    text = "lora 1 adapter a { rank = 3 init = pissa target q_proj }"
    model = compiled(text, base)
    for fqn, site in storage.sites(model):
        (A, B), s = site.lora_branches["a"].tensors(), site.lora_arithmetic["a"].scaling
        own = (site.weight.double() + s * B.double() @ A.double()) - base.get_submodule(
            fqn
        ).weight.double()
        layer = theirs(settings, llama(2).to(torch.bfloat16)).base_model.model.get_submodule(fqn)
        left = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
        other = left - base.get_submodule(fqn).weight.double()
        assert own.norm() < other.norm()
    assert relative(logits(model), want) < 0.1


def test_a_randomised_start_is_reloaded_as_it_was(tmp_path: Path) -> None:
    text = "lora 1 adapter default { rank = 3 init = pissa(iterations = 2) target q_proj }"
    model = compiled(text)
    scatter(model)
    want = logits(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded: Any = lora_fx.load(tmp_path, llama(2), backend=None).eval()
    assert relative(logits(loaded), want) < 1e-5
    assert relative(of_peft(loaded_by_peft(tmp_path, llama(2))), want) < 1e-4


def test_what_is_saved_of_a_changed_base_is_all_of_the_adapter(tmp_path: Path) -> None:
    text = """lora 1 adapter default {
      rank = 3 init = pissa bias = lora_only target q_proj train "model.norm" tokens [3, 7]
    }"""
    model = compiled(text, llama(2, attention_bias=True))
    scatter(model)
    want = logits(model)
    model.save_pretrained(tmp_path)
    peft = loaded_by_peft(tmp_path, llama(2, attention_bias=True))
    with torch.no_grad():
        assert relative(peft(tokens()).logits, model(tokens()).logits) < 1e-5
    assert relative(logits(llama(2, attention_bias=True).eval()), want) > 1e-3


def test_a_rank_beyond_the_layer_is_refused() -> None:
    with pytest.raises(lora_fx.LoraFxError, match="rank"):
        compiled("lora 1 adapter a { rank = 40 init = pissa target q_proj }")
    peft = theirs({"r": 40, "target_modules": ["q_proj"], "init_lora_weights": "pissa"})
    layer = peft.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.r["default"] == 40 != len(layer.lora_A["default"].weight)


def test_dropout_that_is_none_is_refused() -> None:
    with pytest.raises(lora_fx.LoraFxError, match="dropout"):
        compiled("lora 1 adapter a { dropout = -0.5 target q_proj }")
    with pytest.raises(lora_fx.LoraFxError, match="has no dropout"):
        compiled("lora 1 adapter a { dropout = 0.5 target embed_tokens }")
    theirs({"target_modules": ["q_proj"], "lora_dropout": -0.5})
    theirs({"target_modules": ["embed_tokens"], "lora_dropout": 0.5})


def test_an_embedding_has_no_init_of_its_weight() -> None:
    with pytest.raises(lora_fx.LoraFxError, match="has no init `pissa`"):
        compiled("lora 1 adapter a { init = pissa target embed_tokens }")
    theirs({"target_modules": ["embed_tokens"], "init_lora_weights": "nonsense"})


def test_an_embedding_that_renormalises_leaves_the_adapter_alone() -> None:
    base = nn.Sequential(nn.Embedding(11, 5, max_norm=0.5))
    text = 'lora 1 adapter a { rank = 2 init = random target class "Embedding" }'
    model: Any = lora_fx.compile(base, text, backend=None)
    scatter(model, "a")
    before = {n: t.clone() for n, t in live_tensors(model, "a").items()}
    model(torch.tensor([[1, 3, 7]]))
    assert all(torch.equal(before[n], t) for n, t in live_tensors(model, "a").items())


def test_weight_one_is_the_identity_where_peft_loses_the_scaling(tmp_path: Path) -> None:
    text = (
        "lora 1 adapter default { rank = 4 alpha = 5 scaling = rslora init = random target q_proj }"
    )
    model = compiled(text)
    want = effective(model, "default")
    model.add_weighted_adapter(["default"], [1.0], "new", "svd")
    assert all(relative(d, want[f]) < 1e-5 for f, d in effective(model, "new").items())
    model.save_pretrained(tmp_path)
    peft: Any = loaded_by_peft(tmp_path, llama(2))
    peft.add_weighted_adapter(["default"], [1.0], "again", combination_type="svd")
    layer = peft.base_model.model.model.layers[0].self_attn.q_proj
    apart = relative(layer.get_delta_weight("again"), layer.get_delta_weight("default"))
    assert apart == pytest.approx(1, rel=1e-4)  # √4 times as much


def test_an_embedding_named_in_full_is_saved_with_its_layers(tmp_path: Path) -> None:
    text = 'lora 1 adapter default { rank = 2 init = random target "model.embed_tokens" }'
    model = compiled(text)
    model.save_pretrained(tmp_path)
    loaded: Any = lora_fx.load(tmp_path, llama(2), backend=None).eval()
    assert relative(logits(loaded), logits(model)) < 1e-6
    assert relative(logits(llama(2).eval()), logits(model)) > 1e-3
