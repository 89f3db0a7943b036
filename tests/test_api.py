import subprocess
import sys

import lora_fx


def test_the_public_names() -> None:
    assert lora_fx.__all__ == [
        "Diagnostic",
        "LoraFxError",
        "RoutedCollator",
        "build",
        "capture",
        "compile",
        "convert",
        "from_peft",
        "load",
        "merge",
        "optimizer",
        "parse",
        "plan",
    ]
    for name in lora_fx.__all__:
        assert callable(getattr(lora_fx, name))


def test_importing_loads_no_torch() -> None:
    code = "import lora_fx, sys; lora_fx.parse('lora 1\\n'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plan_is_a_function_after_anything_was_imported() -> None:
    code = (
        "import lora_fx, lora_fx.compiler\n"
        "from torch import nn\n"
        "text = 'lora 1\\nadapter a { rank = 2 target \"0\" }'\n"
        "assert lora_fx.plan(text, nn.Sequential(nn.Linear(5, 7))).trainable == 24"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
