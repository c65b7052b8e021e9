"""The pool of pages: references and the order of eviction."""

from __future__ import annotations

from sortserve.scheduling.block_pool import BlockPool
from sortserve.scheduling.prefix_cache import PrefixCache, block_digest, root_digest


def keep_all(page: int) -> bool:
    return True


def keep_none(page: int) -> bool:
    return False


def test_a_fresh_pool_is_all_free() -> None:
    pool = BlockPool(3)

    assert (pool.num_free, pool.num_used, pool.num_kept) == (3, 0, 0)
    pool.check_invariants()


def test_a_shared_page_is_free_after_its_last_release() -> None:
    pool = BlockPool(2)
    (page,) = pool.allocate(1)
    pool.acquire(page)

    pool.release([page], keep=keep_none)
    assert pool.num_used == 1
    pool.release([page], keep=keep_none)

    assert pool.num_used == 0
    pool.check_invariants()


def test_empty_pages_go_out_before_kept_ones() -> None:
    evicted: list[int] = []
    pool = BlockPool(3, on_evict=evicted.append)
    first, second, _ = pool.allocate(3)
    pool.release([first], keep=keep_all)
    pool.release([second], keep=keep_none)

    assert pool.allocate(1) == [second]
    assert evicted == []
    assert pool.allocate(1) == [first]
    assert evicted == [first]


def test_kept_pages_go_out_least_recently_released_first() -> None:
    pool = BlockPool(3)
    a, b, c = pool.allocate(3)
    pool.release([b], keep=keep_all)
    pool.release([a], keep=keep_all)
    pool.release([c], keep=keep_all)
    pool.acquire(b)
    pool.release([b], keep=keep_all)

    assert pool.allocate(3) == [a, c, b]


def test_the_page_that_was_emptied_last_goes_out_first() -> None:
    pool = BlockPool(5)
    a, b, c = pool.allocate(3)
    pool.release([b, a], keep=keep_none)

    assert pool.allocate(2) == [a, b]
    assert c == pool.num_touched - 1 == 2
    pool.check_invariants()


def test_the_cache_grows_to_what_the_load_ever_held_and_then_evicts_its_oldest() -> None:
    evicted: list[int] = []
    pool = BlockPool(100, on_evict=evicted.append)
    for _ in range(20):
        pages = pool.allocate(10)
        pool.check_invariants()
        pool.release(pages, keep=keep_all)

    assert pool.num_touched <= 20
    assert evicted[:3] == [0, 1, 2]
    pages = pool.allocate(30)  # more load: more room for both
    pool.release(pages, keep=keep_all)
    pool.release(pool.allocate(30), keep=keep_all)
    assert 30 < pool.num_touched <= 60
    pool.check_invariants()


def test_a_small_load_has_a_share_of_the_pool_to_cache_in() -> None:
    pool = BlockPool(320)
    for _ in range(40):
        pool.release(pool.allocate(1), keep=keep_all)

    assert pool.num_kept == pool.num_touched == 10


def test_a_pool_that_takes_its_memory_at_once_evicts_only_when_it_must() -> None:
    evicted: list[int] = []
    pool = BlockPool(40, on_evict=evicted.append, resident=True)
    for _ in range(40):
        pool.release(pool.allocate(1), keep=keep_all)
    assert evicted == []

    pool.release(pool.allocate(1), keep=keep_all)
    assert evicted == [0]
    pool.check_invariants()


def test_every_page_can_be_had_at_once_whatever_state_it_is_in() -> None:
    pool = BlockPool(12)
    pages = pool.allocate(8)
    pool.release(pages[:3], keep=keep_all)
    pool.release(pages[3:5], keep=keep_none)

    assert sorted(pool.allocate(9) + pages[5:]) == list(range(12))
    assert pool.num_free == pool.num_kept == 0
    pool.check_invariants()


def test_a_kept_page_can_be_taken_back() -> None:
    pool = BlockPool(1)
    (page,) = pool.allocate(1)
    pool.release([page], keep=keep_all)

    pool.acquire(page)

    assert (pool.num_used, pool.num_kept) == (1, 0)
    pool.check_invariants()


def test_the_prefix_cache_loses_the_deepest_slab_first() -> None:
    cache = PrefixCache()
    digest = block_digest(root_digest(""), [1, 2])
    for page in (10, 11, 12):
        cache.add(digest, page)

    cache.forget(12)

    assert list(cache.pages(digest)) == [10, 11]
    cache.check_invariants()


def test_digests_tell_tokens_prefixes_and_salts_apart() -> None:
    root = root_digest("")

    names = {
        block_digest(root, [1, 2]),
        block_digest(root, [2, 1]),
        block_digest(root_digest("tenant"), [1, 2]),
        block_digest(block_digest(root, [1, 2]), [1, 2]),
    }

    assert len(names) == 4
