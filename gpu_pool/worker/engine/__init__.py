"""The model calls: loading, log-likelihood and generation, with the meaning of lm-eval's HF backend.

What lives here: torch and transformers code that turns token sequences into numbers and texts. What may not: processes,
sockets, jobs; a step learns only through `should_stop` that nobody waits for it any more.
"""
