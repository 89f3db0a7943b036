"""Sites and their parameters: marking, storage, initialisation, the PEFT folder."""
