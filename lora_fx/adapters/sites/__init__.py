"""Modules and parameters that adapters stand at, and what a branch computes there."""
