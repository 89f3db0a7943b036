import pytest
import torch
from torch import nn
from torch.library import opcheck

from lora_fx.graph import ops
from lora_fx.graph.convolution import Window, by_channel, convolution, pointwise
from tests.adapters.convolutions import CASES, MERGED
from tests.dense import relative

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("name", MERGED)
def test_it_moves_as_the_layer_does(name: str) -> None:
    (layer,), x = CASES[name].layer(), CASES[name].x()
    window = Window.of(layer)  # type: ignore[arg-type]
    got = convolution(x, layer.weight, window)  # type: ignore[arg-type]
    if layer.bias is not None:
        got = got + by_channel(layer.bias, window.dimensions)  # type: ignore[arg-type]
    assert got.shape == layer(x).shape
    assert relative(got, layer(x)) < 1e-6


def test_the_text_of_a_window() -> None:
    layer = nn.Conv2d(3, 7, (2, 5), padding="same", dilation=(3, 1), padding_mode="reflect")
    window = Window.of(layer)
    assert str(window) == "1x1:1+2x2+2:3x1:reflect"
    assert Window.parse(str(window)) == window
    for text in ("", "1x1", "1x1:1+2x2+2:3x1", "1:0:1:zeros", "1:0+0:1:zeros:4"):
        with pytest.raises(ValueError, match="window"):
            Window.parse(text)


@pytest.mark.parametrize("groups", [1, 2])
def test_pointwise_is_a_product_at_every_place(groups: int) -> None:
    torch.manual_seed(0)
    h, bias = torch.randn(3, 4, 5, 6), torch.randn(8)
    B = torch.randn(8, 4 // groups, 1, 1)
    whole = torch.block_diag(*B.flatten(1).chunk(groups))
    want = torch.einsum("nrhw,or->nohw", h, whole) + bias.view(-1, 1, 1)
    assert relative(pointwise(h, B, bias), want) < 1e-6
    assert relative(pointwise(h.movedim(1, -1), whole, bias).movedim(-1, 1), want) < 1e-6


@pytest.mark.parametrize("name", ["1d, groups", "2d, circular", "3d, line"])
def test_the_schema_holds(name: str) -> None:
    (layer,), x = CASES[name].layer(), CASES[name].x()
    key = f"conv({Window.of(layer)})[r4:p0.0:activation]"  # type: ignore[arg-type]
    A = torch.randn(4, x.shape[1], *layer.kernel_size)  # type: ignore[misc]
    ones = (1,) * (x.dim() - 2)
    B = torch.randn(layer.out_channels, 4 // CASES[name].groups, *ones)
    args = (layer(x), x, [A, B], torch.tensor([0.5]), key, [])
    opcheck(ops.site, args, test_utils=("test_schema", "test_faketensor"))
    opcheck(
        ops.convolve,
        (x, A, 0.0, "activation", str(Window.of(layer))),  # type: ignore[arg-type]
        test_utils=("test_schema", "test_faketensor"),
    )
