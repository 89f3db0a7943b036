"""An artifact: what `lora-fx compile` writes ahead of training, and `lora_fx.load` starts from."""
