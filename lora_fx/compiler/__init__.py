"""The public verbs, each in its file; `pipeline.py` names every rule and pass."""
