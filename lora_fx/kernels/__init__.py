"""Kernels behind operators of compiled graphs, each with its plain reference."""
