"""Adapters combined into one.

`convert` makes one adapter plain LoRA, `intruders` and `low_rank` say of which change and how.
`operators` work on tensors, `factors` and `gains` on the `part`s of a site, `trained` on what
adapters trained of the base, `combine` on whole adapters.
"""
