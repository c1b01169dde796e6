"""The example of the module's header; what holds of every tree is in test_token_tree.py."""

from __future__ import annotations

from gpu_pool.worker.engine.blocks import Tokens
from gpu_pool.worker.engine.prefix_cache import hold
from gpu_pool.worker.engine.token_tree import Layout, lay_out

P: Tokens = tuple(range(8))
X, Y, W, Z, Q = range(100, 105)


def laid_out(needs: dict[Tokens, int]) -> Layout:
    """Sequences with the first outputs that they need, beside what a chunk of the one sequence P x y has left."""
    known = (*P, X, Y)
    [path] = lay_out([known], [0], longest_block=100).paths
    hold(path)
    sequences = sorted(needs)
    needed_from = [needs[tokens] for tokens in sequences]
    return lay_out(sequences, needed_from, longest_block=100, known=[(known, path)])


def computed(layout: Layout) -> list[tuple[int, Tokens]]:
    """Where blocks begin, and their tokens."""
    return sorted((block.start, block.tokens) for block in layout.blocks)


def test_who_leaves_a_known_path_computes_again_what_it_needs_an_output_of() -> None:
    layout = laid_out({(*P, X, Y, W): 9, (*P, Z): 7, (*P[:4], Q): 3})
    assert computed(layout) == [(3, (P[3], Q)), (7, (P[7], Z)), (9, (Y, W))]


def test_what_many_would_compute_again_is_computed_once_for_all() -> None:
    siblings = {(*P, Z + number): 3 for number in range(20)}
    layout = laid_out({(*P, X, Y, W): 9, (*P[:4], Q): 3} | siblings)
    assert min(block.start for block in layout.blocks) == 3
    assert layout.tokens == len((*P[3:], X, Y, W)) + 1 + 20
