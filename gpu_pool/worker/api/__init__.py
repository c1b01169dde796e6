"""The process that asks one endpoint, for all jobs: chunks from evaluators become HTTP requests, and answers come back.

What lives here: the spawn target (`entry`), its loop (`serving`), one request with its retries (`asking`), and what
requests and answers look like (`bodies`). What may not: torch, and a key anywhere but in the header of a request.
"""
