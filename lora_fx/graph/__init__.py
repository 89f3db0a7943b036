"""The model as a torch.fx graph: the `lora_fx::` ops, capture, text, verification."""
