"""Adapters folded into weights in memory: the program, the statements, the tensors."""
