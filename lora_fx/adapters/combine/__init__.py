"""Adapters combined into one.

`operators` work on tensors, `factors` on the branches of a site, `parts` on what adapters trained
of the base, `combine` on whole adapters.
"""
