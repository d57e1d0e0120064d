"""moe-route inside other programs: evaluation by lm-eval (``lm_eval``), training by transformers (``trainer``), serving
by vLLM (``vllm``).

Importing this package loads none of them; each module needs its program.
"""
