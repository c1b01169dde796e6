"""The worker process: one model replica, bound to its devices for life, serving chunks of requests to evaluators.

What lives here: the spawn targets (`entry`), the process's main loop (`loop`), what talks to the server (`control`) and
to evaluators (`data_channel`, `listening`), the queue between their threads and the computation (`chunk_queue`,
`computing`), the processes that a model is sharded over (`ranks`, `rank`, `rank_link`), the model code itself
(`engine`), and the process that merges a sharded checkpoint (`merging`). What may not: tasks, prompts, metrics (the
evaluator's), decisions about jobs and GPUs (the server's), and anything imported from `server` or `gpu_pool.evaluator`.
Nothing that `entry` imports at module level may import torch or transformers, because the server imports `entry` to
spawn it.
"""
