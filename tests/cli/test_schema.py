import json
import subprocess
import sys

from jsonschema import Draft202012Validator

from lora_fx.spec import parse


def test_it_prints_the_schema_and_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from lora_fx.cli import main\n"
        "sys.argv = ['lora-fx', 'schema']\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    schema = json.loads(done.stdout)
    data = parse("lora 1 adapter x { rank = 3 target linear }").to_json()
    assert Draft202012Validator(schema).is_valid(data)
    assert not Draft202012Validator(schema).is_valid({"lora": 2})
