"""The worker process: one model replica, bound to its devices for life, serving chunks of requests to evaluators.

What lives here: the spawn target (`entry`), the process's main loop (`loop`), what talks to the server (`control`) and
to evaluators (`data_channel`), the queue between their threads and the computation (`chunk_queue`), the model code
itself (`engine`), and the process that merges a sharded checkpoint (`merging`). What may not: tasks, prompts, metrics
(the evaluator's), decisions about jobs and GPUs (the server's), and anything imported from `server` or
`gpu_pool.evaluator`. torch and transformers are imported at module level only under `engine`, by `loop` and by
`merging`; `entry` imports `loop` late, because the server imports `entry` to spawn it.
"""
