"""Passes: whole-graph steps that no statement asks for, run after the rules."""
