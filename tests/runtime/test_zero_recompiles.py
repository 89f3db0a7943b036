"""Once each kind of call has run, nothing that users do between steps makes a graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from tests.runtime.trainer import trainer
from tests.tiny import graphs, llama, step, tokens

ADAPTERS = ("sql", "style")
NARROW, WIDE = "q_proj, down_proj", "linear"


def spec(unit: str = "layers", target: str = NARROW, rank: int = 3, *names: str) -> str:
    adapters = [f"adapter {n} {{ rank = {rank} init = random target {target} }}" for n in names]
    return "\n".join(["lora 1", *adapters, f"compile {{ unit = {unit} }}"])


def compiled(unit: str, layers: int = 3) -> Any:
    return lora_fx.compile(llama(layers), spec(unit, NARROW, 3, *ADAPTERS), backend="eager")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Adapters of the active one's structure, of another rank, and at modules that have none."""
    for name, target, rank in (("same", NARROW, 3), ("rank", NARROW, 5), ("wide", WIDE, 3)):
        text = spec("layers", target, rank, "default")
        lora_fx.compile(llama(3), text, backend=None).save_pretrained(tmp_path / name)
    return {path.name: path for path in tmp_path.iterdir()}


def padded(samples: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(samples, length, dtype=torch.int64)
    mask[1:, length // 2 :] = 0
    return {"input_ids": tokens(samples, length), "attention_mask": mask}


def train(model: Any, samples: int, length: int) -> None:
    step(model.train(), tokens(samples, length))
    inputs = padded(samples, length)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


@torch.no_grad()
def evaluate(model: Any, samples: int, length: int) -> None:
    inputs = padded(samples, length)
    model.eval()(**inputs, labels=inputs["input_ids"])
    model(input_ids=inputs["input_ids"])


def generate(model: Any, samples: int, length: int) -> None:
    model.eval().generate(**padded(samples, length), max_new_tokens=3, min_new_tokens=3)


def every_kind(model: Any, sizes: tuple[tuple[int, int], ...]) -> None:
    """Train, evaluate and generate with these samples and lengths, with adapters and without."""
    for samples, length in sizes:
        train(model, samples, length)
        evaluate(model, samples, length)
        generate(model, samples, length)
        with model.disable_adapter():
            model.train()(input_ids=tokens(samples, length))
            evaluate(model, samples, length)
            generate(model, samples, length)


FIRST = ((3, 17), (2, 17), (3, 11), (1, 17), (1, 11))
FEW = ((3, 17), (2, 11))
LATER = ((5, 12), (1, 19))


def added_graphs(run: Callable[[], object]) -> int:
    before = graphs()
    run()
    return graphs() - before


def steps_of_an_optimizer(model: Any) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    for _ in range(2):
        train(model, 3, 17)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step(), scheduler.step()
        optimizer.zero_grad(set_to_none=True)


def between(model: Any, folders: dict[str, Path], out: Path) -> dict[str, Callable[[], object]]:
    """What users do between steps."""
    return {
        "nothing": lambda: None,
        "steps": lambda: steps_of_an_optimizer(model),
        "switch": lambda: model.set_adapter("style"),
        "save": lambda: model.save_pretrained(out),
        "load its own": lambda: model.load_adapter(out / "style", "style"),
        "load another": lambda: model.load_adapter(folders["same"], "third", is_trainable=True),
        "activate it": lambda: model.set_adapter("third"),
        "delete it": lambda: model.delete_adapter("third"),
        "toggle": lambda: (model.disable_adapters(), model.enable_adapters()),
        "state dict": lambda: model.load_state_dict(model.state_dict()),
    }


@pytest.mark.parametrize("unit", ["layers", pytest.param("model", marks=pytest.mark.slow)])
def test_nothing_between_steps_makes_a_graph(
    unit: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = compiled(unit)
    assert added_graphs(lambda: every_kind(model, FIRST)) > 5
    made = {}
    for name, do in between(model, folders, tmp_path / "out").items():
        made[name] = added_graphs(lambda do=do: (do(), every_kind(model, LATER)))
    assert made == dict.fromkeys(made, 0)


@pytest.mark.parametrize("unit", ["layers", "model"])
def test_trainer_makes_no_graph_in_its_second_run(unit: str, tmp_path: Path) -> None:
    """A last, smaller batch, evaluation, saving, and the scheduler's steps are all in it."""
    model = compiled(unit)
    settings: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"}
    first = trainer(model, tmp_path / "first", **settings)
    assert added_graphs(first.train) > 0
    assert added_graphs(trainer(model, tmp_path / "second", **settings).train) == 0


@pytest.mark.slow
@pytest.mark.parametrize("new", ["rank", "wide"])
def test_a_new_structure_costs_graphs_once(new: str, folders: dict[str, Path]) -> None:
    """Modules that had no adapter are others when they have one, with and without it in force."""
    model = compiled("layers")
    first = added_graphs(lambda: every_kind(model, FEW))
    model.load_adapter(folders[new], "new", is_trainable=True)
    model.set_adapter("new")
    assert 0 < added_graphs(lambda: every_kind(model, FEW)) <= first
    model.set_adapter("sql")
    again = added_graphs(lambda: every_kind(model, FEW))
    assert again == 0 if new == "rank" else again <= first
    for name in ("new", "sql"):
        model.set_adapter(name)
        assert added_graphs(lambda: every_kind(model, ((5, 12),))) == 0


def test_depth_costs_nothing(tmp_path: Path) -> None:
    made = []
    for layers in (3, 6):
        model = compiled("layers", layers)
        text = spec("layers", WIDE, 3, "default")
        lora_fx.compile(llama(layers), text, backend=None).save_pretrained(tmp_path / "wide")
        first = added_graphs(lambda model=model: train(model, 3, 17))
        model.load_adapter(tmp_path / "wide", "wide", is_trainable=True)
        model.set_adapter("wide")
        made.append((first, added_graphs(lambda model=model: train(model, 3, 17))))
    assert made[0] == made[1]


def test_the_counter_sees_a_graph() -> None:
    model = compiled("layers")
    train(model, 3, 17)
    assert added_graphs(lambda: train(model, 3, 17)) == 0
    assert added_graphs(lambda: train(model.to(torch.float64), 3, 17)) > 0
