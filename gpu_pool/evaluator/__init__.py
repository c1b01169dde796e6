"""The evaluator process: tasks, prompts, tokens, cache, scores and result files of one job at a time.

lm_eval, datasets and tokenizers live here and are imported only in the process itself; `entry` alone may be imported by
the server, and imports none of them. Models live in `gpu_pool.worker`.
"""
