"""The worker process: one model replica, bound to its devices for life, serving chunks of requests to evaluators.

What lives here: the spawn target (`entry`), the process's main loop (`loop`), what talks to the server (`control`) and
to evaluators (`data_channel`), the queue between their threads and the computation (`chunk_queue`), and the model code
itself (`engine`). What may not: tasks, prompts, metrics (the evaluator's), decisions about jobs and GPUs (the
server's), and anything imported from `server` or `gpu_pool.evaluator`. torch and transformers are imported at module
level only under `engine` and by `loop`; `entry` imports `loop` late, because the server imports `entry` to spawn it.
"""
