"""Passes on what torch compiles: one direction's graph of aten operators, autograd done."""
