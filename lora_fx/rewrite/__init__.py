"""The rewrite engine; it knows graphs and rules, and nothing of LoRA."""
