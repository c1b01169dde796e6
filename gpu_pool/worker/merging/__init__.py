"""The process that merges a sharded training checkpoint, one tensor after another.

What lives here: its spawn target (`entry`), the merge from beginning to end (`merging`), what reads shards
(`distcp`, `rank_files`), and what writes weights (`weights`) and moves them to their place when they are whole
(`publishing`). What may not: anything that could run code that a checkpoint brings. Nothing is unpickled but by
`torch.load(weights_only=True)` and by the unpickler in `distcp`, which knows a dozen names.
"""
