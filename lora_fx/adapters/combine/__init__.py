"""Adapters combined into one.

`operators` work on tensors, `factors` and `gains` on the `part`s of a site, `trained` on what
adapters trained of the base, `combine` on whole adapters.
"""
