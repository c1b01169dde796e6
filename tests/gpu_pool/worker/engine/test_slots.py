"""Rows that come, grow and go against attention over everything that each has seen, without a model."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from token_trees import distinct

from gpu_pool.worker.engine.blocks import BlockPath, Tokens
from gpu_pool.worker.engine.prefix_cache import hold
from gpu_pool.worker.engine.slots import Slots
from gpu_pool.worker.engine.token_tree import Layout, lay_out

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM, VALUE_DIM, SCALE, LAYERS = 4, 2, 8, 12, 0.3, 2
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
OPTIONS = {
    "plain": (None, None, None),
    "window": (9, None, None),
    "wide window": (60, None, None),
    "soft-cap": (None, 1.5, None),
    "sinks": (None, None, SINKS),
    "all": (9, 1.5, SINKS),
}


def vectors(count: int, dim: int) -> torch.Tensor:
    return torch.randn(count, KV_HEADS, dim)


@dataclass
class Row:
    """What one row has seen: by layer, its keys and values in order."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


def read(sequences: list[Tokens], longest_block: int) -> tuple[Layout, dict[Tokens, Row]]:
    """Blocks with random keys and values, and what rows that begin with each sequence have seen."""
    layout = lay_out(sequences, [0] * len(sequences), longest_block=longest_block)
    for path in layout.paths:
        hold(path)
    for block in layout.blocks:
        block.keys_values = {
            layer: tuple(vectors(block.reach, dim).transpose(0, 1) for dim in (DIM, VALUE_DIM))
            for layer in range(LAYERS)
        }
    rows: dict[Tokens, Row] = {}
    for tokens, path in zip(sequences, layout.paths, strict=True):
        row = rows[tokens] = Row()
        for layer in range(LAYERS):
            parts = [(block.keys_values[layer], length) for block, length in path.sources]
            row.keys.append(torch.cat([keys[:, :length] for (keys, _), length in parts], 1).transpose(0, 1))
            row.values.append(torch.cat([values[:, :length] for (_, values), length in parts], 1).transpose(0, 1))
    return layout, rows


def expected(
    query: torch.Tensor, row: Row, layer: int, window: int | None, softcap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Result [H, V] of one query [H, D] at the row's last position, in fp64."""
    keys, values = (part[layer].double().repeat_interleave(2, dim=1) for part in (row.keys, row.values))
    scores = torch.einsum("hd,lhd->hl", query.double(), keys) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if window is not None:
        scores[:, :-window] = -torch.inf
    if sinks is not None:
        weights = torch.cat([scores, sinks.double()[:, None]], -1).softmax(-1)[:, :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hl,lhd->hd", weights, values)


def step(slots: Slots, rows: list[Row], options: str) -> None:
    """One token more in each row, checked in each layer."""
    window, softcap, sinks = OPTIONS[options]
    positions = slots.next_positions()
    assert positions.tolist() == [len(row.keys[0]) for row in rows]
    for layer in range(LAYERS):
        query = torch.randn(len(rows), HEADS, DIM)
        key, value = vectors(len(rows), DIM), vectors(len(rows), VALUE_DIM)
        found = slots.attend(layer, query, key, value, scale=SCALE, window=window, softcap=softcap, sinks=sinks)
        for index, row in enumerate(rows):
            row.keys[layer] = torch.cat([row.keys[layer], key[index : index + 1]])
            row.values[layer] = torch.cat([row.values[layer], value[index : index + 1]])
            wanted = expected(query[index], row, layer, window, softcap, sinks)
            torch.testing.assert_close(found[index].double(), wanted, rtol=1e-4, atol=1e-5)
    slots.advance()


def copy(row: Row) -> Row:
    return Row(list(row.keys), list(row.values))


TREE = distinct(
    [
        *((0,) * 40 + (ray,) * (3 * ray) for ray in range(1, 4)),  # share 40 tokens, one block
        *((0,) * 25 + (9,) * 20 + (ray,) * 2 for ray in range(4)),  # share 25 of that, and 20 of another
        (5,) * 30,
        (7,),
    ]
)


def shared_of(path: BlockPath, random_: random.Random) -> int:
    """How many tokens stay in the tree: none, all, or anything between."""
    return random_.choice([0, path.end, random_.randint(0, path.end)])


@pytest.mark.parametrize("longest_block", [11, 10**9])
@pytest.mark.parametrize("options", OPTIONS)
def test_rows_come_and_go(options, longest_block):
    torch.manual_seed(0)
    source = random.Random(1)
    layout, seen = read(TREE, longest_block)
    slots = Slots(6, CPU)
    rows: list[Row] = []
    for _ in range(25):
        while len(rows) < 6 and source.random() < 0.6:
            index = source.randrange(len(TREE))
            slots.add(layout.paths[index], shared_of(layout.paths[index], source))
            rows.append(copy(seen[TREE[index]]))
        if not rows:
            continue
        assert len(slots) == len(rows)
        step(slots, rows, options)
        while rows and source.random() < 0.3:
            leaving = source.randrange(len(rows))
            slots.remove(leaving)
            rows[leaving] = rows[-1]
            rows.pop()


@pytest.mark.parametrize("shared", [0, 40])
def test_rows_outgrow_their_room(shared):
    torch.manual_seed(0)
    layout, seen = read(TREE, 10**9)
    slots = Slots(2, CPU)
    rows: list[Row] = []
    for index in (0, len(TREE) - 1):
        slots.add(layout.paths[index], min(shared, layout.paths[index].end))
        rows.append(copy(seen[TREE[index]]))
    for _ in range(150):
        step(slots, rows, "plain")


def test_what_is_shared_is_not_copied():
    """A slot holds its row's own tokens alone."""
    layout, seen = read(TREE, 10**9)
    slots = Slots(len(TREE), CPU)
    for path in layout.paths:
        slots.add(path, path.end)
    step(slots, [copy(seen[tokens]) for tokens in TREE], "plain")
    assert slots._lengths == [1] * len(TREE)


def test_freed_slot_forgets_its_row():
    """What a row leaves behind is not seen by the next one in its slot."""
    torch.manual_seed(0)
    layout, seen = read(TREE, 10**9)
    short, long = TREE.index((7,)), TREE.index((5,) * 30)
    slots = Slots(1, CPU)
    slots.add(layout.paths[long], 0)
    step(slots, [copy(seen[TREE[long]])], "plain")
    slots.remove(0)
    assert len(slots) == 0
    slots.add(layout.paths[short], 0)
    row = copy(seen[TREE[short]])
    for _ in range(5):
        step(slots, [row], "plain")


def test_longer_rows_take_the_place_of_rows_that_are_no_more():
    """Of 40 slots 4 are left when rows may get ten times as long."""
    torch.manual_seed(0)
    layout, seen = read(TREE, 10**9)
    short, long = TREE.index((7,)), 0
    slots = Slots(40, CPU)
    slots.longest = 4
    for _ in range(40):
        slots.add(layout.paths[short], 0)
    rows = [copy(seen[TREE[short]]) for _ in range(40)]
    step(slots, rows, "plain")
    before = slots.bytes
    for _ in range(39):
        slots.remove(len(slots) - 1)
    slots.most, slots.longest = 3, layout.paths[long].end + 1
    assert slots.longest > 40
    slots.add(layout.paths[long], 0)
    assert slots.bytes <= 3 * slots.longest * before // (40 * 4)
    rows = [rows[0], copy(seen[TREE[long]])]
    step(slots, rows, "plain")
