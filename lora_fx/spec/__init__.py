"""Text to Spec: syntax, meaning, and every mistake with its place. Knows no torch."""

from lora_fx.spec.resolve import parse as parse
