"""A PEFT LoRA config as a `.lora` text. Knows no torch, and PEFT only by what it documents."""
