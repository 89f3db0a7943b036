"""The compiled model at run time: units, the Hugging Face facade, adapters by name."""
