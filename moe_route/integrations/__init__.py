"""moe-route inside other programs: evaluation by lm-eval (``lm_eval``) and training by transformers (``trainer``).

Importing this package loads none of them; each module needs its program.
"""
