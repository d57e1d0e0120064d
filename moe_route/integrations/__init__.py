"""moe-route inside other programs: evaluation by lm-eval (``lm_eval``), training by transformers (``trainer``), serving
by vLLM (``vllm``) and SGLang (``sglang``), over what engines have in common (``serving``).

Importing this package loads none of them; each module needs its program.
"""
