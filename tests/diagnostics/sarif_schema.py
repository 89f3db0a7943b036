"""The part of the JSON Schema of SARIF 2.1.0 that a log of lora_fx uses; nothing else may occur.

Written from the text of the standard; paragraphs are its own.
"""

from typing import Any

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
ORDINAL = {"type": "integer", "minimum": 1}


def record(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def listed(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item}


MESSAGE = record("text", text=TEXT, markdown=TEXT)  # 3.11, 3.12
REGION = record(  # 3.30
    startLine=ORDINAL,
    startColumn=ORDINAL,
    endLine=ORDINAL,
    endColumn=ORDINAL,
    charOffset=COUNT,
    charLength=COUNT,
)
ARTIFACT = record(uri={"type": "string", "format": "uri-reference"})  # 3.4
LOCATION = record(  # 3.28, 3.29
    id=COUNT,
    message=MESSAGE,
    physicalLocation=record("artifactLocation", artifactLocation=ARTIFACT, region=REGION),
)
RULE = record("id", id=TEXT, shortDescription=MESSAGE, help=MESSAGE)  # 3.49
RESULT = record(  # 3.27
    "message",
    ruleId=TEXT,
    ruleIndex=COUNT,
    level={"enum": ["none", "note", "warning", "error"]},
    message=MESSAGE,
    locations=listed(LOCATION),
    relatedLocations=listed(LOCATION),
)
DRIVER = record("name", name=TEXT, version=TEXT, rules=listed(RULE))  # 3.19
RUN = record(  # 3.14
    "tool",
    tool=record("driver", driver=DRIVER),
    columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
    results=listed(RESULT),
)
LOG = record(  # 3.13
    "version runs",
    **{
        "$schema": {"type": "string", "format": "uri"},
        "version": {"const": "2.1.0"},
        "runs": listed(RUN),
    },
)
