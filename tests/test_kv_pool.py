"""KV blocks are shared where prefixes agree, and never lost."""

from __future__ import annotations

import random

import numpy as np
import pytest

from slos_serve.backend.kv_pool import KvPool


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


def filled(pool: KvPool, ids: np.ndarray) -> list[int]:
    """Blocks of `ids`, computed and remembered."""
    keys = pool.chain(ids)
    blocks = pool.match(keys)
    blocks += pool.allocate(pool.blocks_for(len(ids)) - len(blocks))
    for block, key in zip(blocks, keys, strict=False):
        pool.remember(block, key)
    return blocks


def test_a_freed_prefix_is_found_again() -> None:
    """A second request with the same beginning gets the same full blocks, and only those."""
    pool = KvPool(8, 2)
    first = filled(pool, tokens(1, 2, 3, 4, 5))
    pool.free(first)
    assert pool.free_blocks == 8
    assert pool.match(pool.chain(tokens(1, 2, 3, 4, 9, 9))) == first[:2]
    pool.check()


def test_a_block_is_known_by_all_that_comes_before_it() -> None:
    """The same two tokens after another beginning are another block."""
    pool = KvPool(8, 2)
    pool.free(filled(pool, tokens(1, 2, 3, 4)))
    assert pool.match(pool.chain(tokens(9, 9, 3, 4))) == []
    assert pool.match(pool.chain(tokens(3, 4))) == []


def test_sharing_is_counted() -> None:
    """A block with two holders is one shared block, and free only when both have let go."""
    pool = KvPool(4, 2)
    first = filled(pool, tokens(1, 2, 3, 4))
    second = pool.match(pool.chain(tokens(1, 2)))
    assert (pool.shared_blocks, pool.free_blocks) == (1, 2)
    assert pool.freed_by([first]) == 1
    assert pool.freed_by([first, second]) == 2
    pool.free(first)
    assert (pool.shared_blocks, pool.free_blocks) == (0, 3)
    pool.free(second)
    assert pool.free_blocks == 4
    pool.check()


def test_the_least_recently_used_prefix_is_forgotten_first_and_from_its_end() -> None:
    """When memory is needed, an old prefix shrinks from its end while a newer one stays whole."""
    pool = KvPool(4, 2)
    pool.free(filled(pool, tokens(1, 2, 3, 4)))
    pool.free(filled(pool, tokens(5, 6, 7, 8)))
    pool.allocate(1)
    assert len(pool.match(pool.chain(tokens(1, 2, 3, 4)))) == 1
    assert len(pool.match(pool.chain(tokens(5, 6, 7, 8)))) == 2
    pool.check()


def test_too_many_blocks_are_refused_without_a_change() -> None:
    """Asking for more than there is says how much there is."""
    pool = KvPool(4, 2)
    pool.allocate(3)
    with pytest.raises(MemoryError, match="2 KV blocks asked for, 1 of 4 are free"):
        pool.allocate(2)
    assert pool.free_blocks == 1
    pool.check()


def test_letting_go_twice_is_a_broken_invariant() -> None:
    """A block that nobody holds cannot be freed."""
    pool = KvPool(4, 2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.free(blocks)


def test_a_forgotten_block_is_not_found() -> None:
    """What a failed request computed is not offered to others."""
    pool = KvPool(4, 2)
    pool.free(filled(pool, tokens(1, 2, 3, 4)), forget=True)
    assert pool.match(pool.chain(tokens(1, 2, 3, 4))) == []
    pool.check()


@pytest.mark.parametrize("seed", range(5))
def test_the_pool_stays_whole(seed: int) -> None:
    """After any sequence of requests every block is exactly one of empty, idle and held."""
    chance = random.Random(seed)
    pool = KvPool(24, 2)
    held: list[list[int]] = []
    for _ in range(400):
        ids = tokens(*(chance.randrange(2) for _ in range(chance.randrange(1, 14))))
        if chance.random() < 0.5 and pool.free_blocks >= pool.blocks_for(len(ids)):
            held.append(filled(pool, ids))
        elif held:
            pool.free(held.pop(chance.randrange(len(held))), forget=chance.random() < 0.1)
        pool.check()
    assert pool.free_blocks == 24 - len({block for blocks in held for block in blocks})
