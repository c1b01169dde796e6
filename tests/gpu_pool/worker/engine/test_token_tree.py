"""Properties of the token tree's layout, on trees of all shapes. Pure Python."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from token_trees import distinct, needs, room_for, tokens_alone, trees

from gpu_pool.worker.engine.blocks import Block, BlockPath, Tokens, common_prefix
from gpu_pool.worker.engine.packed import release
from gpu_pool.worker.engine.prefix_cache import hold
from gpu_pool.worker.engine.prefix_tree import shared_beginnings
from gpu_pool.worker.engine.token_tree import GRID, Layout, Room, lay_out, lay_out_grid, pack, plan

UNBOUNDED = 10**9


def spell(path: BlockPath) -> Tokens:
    """The tokens that a path holds."""
    return tuple(token for block, length in path.sources for token in block.tokens[:length])


def trie_size(sequences: Sequence[Tokens]) -> int:
    """Distinct tokens of the tree of `sequences`, sorted."""
    pairs = zip([(), *sequences], sequences, strict=False)
    return sum(len(tokens) - common_prefix(previous, tokens) for previous, tokens in pairs)


def check(layout: Layout, sequences: Sequence[Tokens], longest_block: int, known: Sequence[BlockPath] = ()) -> None:
    """What holds of every layout."""
    assert [spell(path) for path in layout.paths] == list(sequences)
    computed = {source.block for path in known for source in path.sources}
    for block in layout.blocks:
        assert 1 <= len(block.tokens) <= longest_block
        assert block.path.end == block.start
        for source in block.path.sources:
            assert source.block in computed
            assert source.length <= source.block.reach <= len(source.block.tokens)
        computed.add(block)
    for path in layout.paths:
        ends = [source.block.start + source.length for source in path.sources]
        assert [source.block.start for source in path.sources] == [0, *ends[:-1]]


def run_all(layout: Layout) -> None:
    """Compute every block, as far as users are concerned."""
    for block in layout.blocks:
        release(block.path.sources)


@given(st.lists(st.integers(0, 1), max_size=200), st.lists(st.integers(0, 1), max_size=200), st.integers(0, 150))
def test_common_prefix(first, second, same):
    one, other = (7,) * same + tuple(first), (7,) * same + tuple(second)
    steps = zip(one, other, strict=False)
    assert common_prefix(one, other) == next(
        (index for index, (left, right) in enumerate(steps) if left != right), min(len(one), len(other))
    )


@settings(max_examples=150)
@given(st.data(), st.sampled_from([1, 3, 16, UNBOUNDED]))
def test_paths_spell_their_sequences(data, longest_block):
    sequences = data.draw(trees())
    layout = lay_out(sequences, data.draw(needs(sequences)), longest_block=longest_block)
    check(layout, sequences, longest_block)
    assert sum(block.sequences for block in layout.blocks) == len(sequences)
    run_all(layout)
    assert all(block.users == 0 for block in layout.blocks)


@settings(max_examples=150)
@given(st.data())
def test_every_token_is_computed_about_once(data):
    sequences = data.draw(trees())
    layout = lay_out(sequences, [0] * len(sequences), longest_block=UNBOUNDED)
    assert trie_size(sequences) <= layout.tokens <= 1.05 * trie_size(sequences)


def deep(depth: int, run: int) -> list[Tokens]:
    """A complete binary tree, `run` tokens between branches."""
    beginnings: list[Tokens] = [()]
    for _ in range(depth):
        beginnings = [tokens + (token,) * run for tokens in beginnings for token in (1, 2)]
    return beginnings


def comb(teeth: int, step: int) -> list[Tokens]:
    """Each sequence is the one before and `step` tokens."""
    return [tuple(range(step * (tooth + 1))) for tooth in range(teeth)]


def toothed_comb(teeth: int, tooth: int) -> list[Tokens]:
    """Each sequence leaves a common line one token later, for `tooth` tokens of its own."""
    return [tuple(range(place)) + (1000 + place,) * tooth for place in range(teeth)]


def star(rays: int, hub: int, ray: int) -> list[Tokens]:
    """One beginning of `hub` tokens, then `rays` ways on."""
    return [(0,) * hub + (1 + index,) * ray for index in range(rays)]


def caterpillar(depth: int) -> list[Tokens]:
    """At every fork the single leaf is the heavier side: sequences grow exponentially as they leave earlier."""
    return [(1,) * place + (2,) * 2 ** (depth - place) for place in range(depth)]


def few_shot(prefixes: int, questions: int, answers: int) -> list[Tokens]:
    """Documents with answers after shared examples, much like an evaluation."""
    return [
        (prefix,) * 500 + (100 + question, 7) * 20 + (200 + answer,) * 3
        for prefix in range(prefixes)
        for question in range(questions)
        for answer in range(answers)
    ]


SHAPES = {
    "deep": deep(8, 3),
    "deep with long runs": deep(5, 100),
    "comb": comb(200, 1),
    "comb of long steps": comb(40, 50),
    "toothed comb": toothed_comb(150, 5),
    "toothed comb, long teeth": toothed_comb(40, 300),
    "star": star(300, 600, 4),
    "star of long rays": star(20, 10, 600),
    "star without a hub": star(200, 0, 5),
    "single tokens": [(token,) for token in range(200)],
    "one sequence": [tuple(range(3000))],
    "caterpillar": caterpillar(12),
    "duplicates": [tokens for tokens in few_shot(2, 5, 2) for _ in range(10)],
    "few-shot": few_shot(4, 25, 4),
    "long one among short ones": [tuple(range(20_000)), *star(100, 3, 5)],
}


@pytest.mark.parametrize("longest_block", [64, 2048])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, longest_block):
    sequences = distinct(SHAPES[shape])
    layout = lay_out(sequences, [len(tokens) - 1 for tokens in sequences], longest_block=longest_block)
    check(layout, sequences, longest_block)
    assert trie_size(sequences) <= layout.tokens <= 1.05 * trie_size(sequences)
    run_all(layout)
    assert all(block.users == 0 for block in layout.blocks)


@pytest.mark.parametrize("shape", SHAPES)
def test_paths_are_short(shape):
    """A block is left for another at most log2(tokens) times: the side that is left behind is the heavier one."""
    sequences = distinct(SHAPES[shape])
    layout = lay_out(sequences, [0] * len(sequences), longest_block=UNBOUNDED)
    longest = max(len(path.sources) for path in layout.paths)
    assert longest <= math.log2(trie_size(sequences)) + 1
    assert longest <= len(sequences)


@settings(max_examples=100)
@given(trees())
def test_paths_of_any_tree_are_short(sequences):
    layout = lay_out(sequences, [0] * len(sequences), longest_block=UNBOUNDED)
    assert max(len(path.sources) for path in layout.paths) <= math.log2(trie_size(sequences)) + 1


def known_of(sequences: Sequence[Tokens], longest_block: int = UNBOUNDED) -> list[tuple[Tokens, BlockPath]]:
    """What a cache would know after computing `sequences`."""
    layout = lay_out(sequences, [0] * len(sequences), longest_block=longest_block)
    for path in layout.paths:
        hold(path)
    run_all(layout)
    return list(zip(sequences, layout.paths, strict=True))


def assert_needed_are_new(layout: Layout, sequences: Sequence[Tokens], needed_from: Sequence[int]) -> None:
    """Outputs come only from blocks that are computed now."""
    new = set(layout.blocks)
    for tokens, start, path in zip(sequences, needed_from, layout.paths, strict=True):
        places = path.locate(start, len(tokens))
        assert [block.start + index for block, index in places] == list(range(start, len(tokens)))
        assert all(block in new for block, _ in places)


@settings(max_examples=200)
@given(st.data(), st.sampled_from([5, UNBOUNDED]))
def test_known_paths(data, longest_block):
    """Whatever is known, needed outputs are computed, nothing more than without, and users come and go."""
    sequences = data.draw(trees())
    needed_from = data.draw(needs(sequences))
    others = distinct([*data.draw(trees()), *data.draw(st.lists(st.sampled_from(sequences), max_size=3))])
    cut = data.draw(st.integers(1, 80))
    entries = known_of(others, longest_block)
    held = {source.block: source.block.users for _, path in entries for source in path.sources}
    known: list[tuple[Tokens, BlockPath]] = []
    for tokens, path in entries:
        same = max(common_prefix(tokens, sequence) for sequence in sequences)
        if same := min(same, cut):
            known.append((tokens[:same], path.until(same)))
    layout = lay_out(sequences, needed_from, longest_block=longest_block, known=known)
    check(layout, sequences, longest_block, [path for _, path in known])
    assert_needed_are_new(layout, sequences, needed_from)
    assert layout.tokens <= 1.05 * trie_size(sequences)
    run_all(layout)
    assert {block: block.users for block in held} == held
    assert all(block.users == 0 for block in layout.blocks)


def test_known_beginning_is_not_computed_again():
    sequences = distinct(few_shot(2, 10, 4))
    [(tokens, path)] = known_of([(0,) * 500])
    needed_from = [len(sequence) - 3 for sequence in sequences]
    layout = lay_out(sequences, needed_from, longest_block=UNBOUNDED, known=[(tokens, path)])
    assert layout.tokens <= trie_size(sequences) - 500
    assert [found.sources[0].block for found in layout.paths].count(path.sources[0].block) == len(sequences) // 2


def test_all_of_the_longest_known_path_is_used():
    """Of known beginnings that contain each other, and of others that branch off them."""
    line = tuple(range(400))
    known = known_of([line[:100], line[:300]]) + known_of([line[:200] + (1,) * 100])
    sequences = distinct([line, line[:200] + (1,) * 100 + (2,) * 50, line[:50] + (3,) * 10])
    layout = lay_out(sequences, [len(tokens) - 1 for tokens in sequences], longest_block=UNBOUNDED, known=known)
    assert layout.tokens == 100 + 50 + 10


def test_needed_outputs_limit_what_is_known():
    line = tuple(range(200))
    [(tokens, path)] = known_of([line])
    layout = lay_out([line], [150], longest_block=UNBOUNDED, known=[(tokens, path)])
    assert [(block.start, block.end) for block in layout.blocks] == [(150, 200)]
    branch = (*line[:120], 7)
    layout = lay_out([branch, line], [100, 150], longest_block=UNBOUNDED, known=[(tokens, path)])
    assert_needed_are_new(layout, [branch, line], [100, 150])
    assert min(block.start for block in layout.blocks) == 100


def test_branches_off_a_known_path_compute_the_output_that_they_need_themselves():
    """A single one each, or all that is after it once, whichever is less."""
    line = tuple(range(200))
    known = known_of([line])
    branches = distinct([(*line[:end], 300 + end, *[0] * 20) for end in (60, 120, 180)])
    needed = [len(tokens) - 22 for tokens in branches]
    layout = lay_out(branches, needed, longest_block=UNBOUNDED, known=known)
    assert layout.tokens == 3 * (21 + 1)
    assert_needed_are_new(layout, branches, needed)
    ending = distinct([line[:100], line[:150]])
    assert lay_out(ending, [99, 149], longest_block=UNBOUNDED, known=known).tokens == 2
    many = distinct([(*line[:end], 300) for end in range(180, 200)])
    needed = [170] * len(many)
    layout = lay_out(many, needed, longest_block=UNBOUNDED, known=known)
    assert layout.tokens == 200 - 1 - 170 + 20
    assert_needed_are_new(layout, many, needed)


def most_held(layout: Layout) -> int:
    """Tokens whose keys and values are held at a time, at most, when blocks are computed one by one."""
    held, most = set[Block](), 0
    for block in layout.blocks:
        held.add(block)
        release(block.path.sources)
        held = {block for block in held if block.users}
        most = max(most, sum(block.reach for block in held))
    assert not held
    return most


@pytest.mark.parametrize("longest_block", [50, UNBOUNDED])
def test_long_documents_are_held_one_at_a_time(longest_block):
    """Those of a task, behind its examples and before their choices; the longest is the heaviest path."""
    documents = [(*range(500), 500 + document, *range(1000, 1300 + 10 * document)) for document in range(20)]
    sequences = distinct([(*document, 3, choice) for document in documents for choice in range(4)])
    layout = lay_out(sequences, [len(tokens) - 1 for tokens in sequences], longest_block=longest_block)
    assert most_held(layout) <= max(map(len, sequences)) + (500 if longest_block == UNBOUNDED else longest_block)


@pytest.mark.parametrize("longest_block", [7, UNBOUNDED])
def test_shared_beginnings(longest_block):
    sequences = distinct(few_shot(3, 10, 4))
    layout = lay_out(sequences, [0] * len(sequences), longest_block=longest_block)
    assert layout.tree is not None
    found = {sequences[index][:length] for index, length in shared_beginnings(layout.tree, 8)}
    assert found == {(prefix,) * 500 for prefix in range(3)}


@settings(max_examples=100)
@given(trees(), st.integers(1, 4))
def test_shared_beginnings_of_any_tree(sequences, shared_by):
    """Each is shared by enough sequences, and none that is longer and goes on after it is."""
    layout = lay_out(sequences, [0] * len(sequences), longest_block=UNBOUNDED)
    assert layout.tree is not None
    for index, length in shared_beginnings(layout.tree, shared_by):
        having = [tokens for tokens in sequences if tokens[:length] == sequences[index][:length]]
        assert len(having) >= shared_by
        longer = [tokens[: length + 1] for tokens in having if len(tokens) > length]
        assert all(longer.count(tokens) < shared_by for tokens in longer)


@settings(max_examples=100)
@given(trees(), st.integers(1, 30))
def test_pack_keeps_the_order_and_fills_batches(sequences, room):
    layout = lay_out(sequences, [0] * len(sequences), longest_block=16)

    def fits(batch: list[Block], block: Block) -> bool:
        return sum(len(member.tokens) for member in (*batch, block)) <= room

    batches = list(pack(layout.blocks, tokens_alone, room_for(room)))
    assert [block for batch in batches for block in batch] == layout.blocks
    for batch, following in itertools.pairwise(batches):
        assert len(batch) == 1 or fits(batch[:-1], batch[-1])
        assert not fits(batch, following[0])


def test_deterministic_batches_are_single_blocks():
    blocks = lay_out([(1, 2), (3, 4)], [0, 0], longest_block=1).blocks
    assert list(pack(blocks, tokens_alone, room_for(10), deterministic=True)) == [[block] for block in blocks]


def test_a_plan_has_room_for_each_block_and_its_logits():
    sequences = [tuple(range(300)), tuple(range(300, 900))]
    for room, longest in ((Room(100, 40, 1, 1), 40), (Room(30, 40, 1, 1), 30), (Room(0, 0, 1, 1), 1)):
        blocks = plan(sequences, [0, 0], room, (), deterministic=False).blocks
        assert max(len(block.tokens) for block in blocks) == longest
    grid = plan(sequences, [0, 0], Room(10, 10, 1, 1), (), deterministic=True)
    assert [len(block.tokens) for block in grid.blocks] == [GRID, GRID, 300 % GRID, *[GRID] * 4, 600 % GRID]


def test_nothing_to_pack():
    assert list(pack([], tokens_alone, room_for(1))) == []


@settings(max_examples=200, phases=[Phase.generate])  # shrinking its data takes for ever
@given(trees(), st.integers(1, 6), st.data())
def test_grid(sequences, grid, data):
    """Blocks cut at multiples of the grid only; what is needed is computed, what is not may be known."""
    first = lay_out_grid(sequences, [0] * len(sequences), grid=grid)
    known = [(tokens, path) for tokens, path in zip(sequences, first.paths, strict=True) if data.draw(st.booleans())]
    needed = [data.draw(st.integers(0, len(tokens) - 1)) for tokens in sequences]
    layout = lay_out_grid(sequences, needed, grid=grid, known=known)
    new = set(layout.blocks)
    for tokens, path, start in zip(sequences, layout.paths, needed, strict=True):
        assert [token for block, length in path.sources for token in block.tokens[:length]] == list(tokens)
        assert all(block.start % grid == 0 and length <= grid for block, length in path.sources)
        assert {block for block, _ in path.locate(start, len(tokens))} <= new


def test_a_known_block_serves_none_that_needs_its_outputs():
    """The long sequence needs no output of the first two blocks, the short one does."""
    short, long = tuple(range(9)), tuple(range(13))
    known = [(long[:8], lay_out_grid([long[:8]], [7], grid=4).paths[0])]
    layout = lay_out_grid([short, long], [2, 12], grid=4, known=known)
    for path, start in zip(layout.paths, (2, 12), strict=True):
        assert {block for block, _ in path.locate(start, path.end)} <= set(layout.blocks)
    later = lay_out_grid([long], [12], grid=4, known=known)
    assert later.tokens == 5
