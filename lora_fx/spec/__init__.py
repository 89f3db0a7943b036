"""Text to Spec: syntax, meaning, and every mistake with its place. Knows no torch."""
