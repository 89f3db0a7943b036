"""`lora-fx schema`."""

import json


def schema() -> None:
    """Print the JSON Schema of the JSON form of a spec."""
    from lora_fx.spec.json_form.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
