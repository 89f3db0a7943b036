"""A spec as plain data, which JSON can hold and Python can build.

    {"lora": 1,
     "let": {"small": 8},
     "adapters": {"default": {"rank": "2 * small",
                              "targets": ["linear", {"select": "o_proj", "rank": 32}]}},
     "compile": {"mode": {"text": "max-autotune"}, "unit": "model"}}

A value is a number, `true` or `false`; a string, which is an expression of the language, so that
words are strings; `{"text": "…"}`, a text; or a list of values. Selectors, mixes, ranges and
conditions are strings in the language's own syntax. Where a mapping would have its main key only,
as `{"select": "linear"}`, its value stands for it.

    syntax tree ── write ──► data ── read ──► .lora text ── parse ──► Spec
"""
