"""The optimizer that a spec asks for."""
