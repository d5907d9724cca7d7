"""The guard: what it samples, what it drops and how fast, and how rarely it is wrong."""

import random

import pytest

from sglang_tokenweave.tuning.guard import PERIOD, Guard

KEY = ("prefill", 1024)


def feed(guard, stock, planned, pairs, draw=None, key=KEY):
    """Run batches until so many pairs are full; return how many it took to drop the plan."""
    pair = 0
    while pair < pairs:
        is_stock = guard.runs_stock(key)
        if not guard.is_sampled(key):
            continue
        tokens = draw.randint(900, 1100) if draw else 1000
        us = (stock if is_stock else planned) * tokens
        us *= draw.gauss(1, 0.02) if draw else 1
        pair += not is_stock
        if guard.add(key, is_stock=is_stock, us=us, num_tokens=tokens):
            return pair
    return None


def batches_to_next_pair(guard, key=KEY):
    """Count the batches up to the second one of the next pair."""
    for count in range(1, 10**6):
        guard.runs_stock(key)
        if guard.is_sampled(key) and guard.buckets[key].batches == guard.buckets[key].period:
            return count
    return None


def test_two_batches_of_a_period_run_stock_and_the_second_is_compared_with_a_second_planned_one():
    guard = Guard(period=8)
    ran = [(guard.runs_stock(KEY), guard.is_sampled(KEY)) for _ in range(24)]
    assert [place for place, (stock, _) in enumerate(ran) if stock] == [4, 5, 12, 13, 20, 21]
    assert [place for place, (_, sampled) in enumerate(ran) if sampled] == [5, 7, 13, 15, 21, 23]


def test_a_plan_that_loses_every_pair_is_dropped_after_eighteen():
    guard = Guard()
    assert feed(guard, stock=1.0, planned=1.1, pairs=100) == 18
    assert guard.dropped() == [KEY]
    assert guard.buckets[KEY].lost == 18
    assert all(guard.runs_stock(KEY) for _ in range(3 * PERIOD))
    assert not guard.is_sampled(KEY)
    assert not guard.add(KEY, is_stock=False, us=9e9, num_tokens=1), "it is dropped once"


def test_a_plan_that_wins_stays():
    guard = Guard(period=4)
    assert feed(guard, stock=1.1, planned=1.0, pairs=2000) is None
    assert guard.dropped() == []


def test_a_plan_that_won_for_long_is_dropped_as_fast_as_any_other():
    guard = Guard(period=4)
    assert feed(guard, stock=1.1, planned=1.0, pairs=5000) is None
    assert feed(guard, stock=1.0, planned=1.1, pairs=100) <= 25


def test_a_plan_that_proves_itself_is_compared_more_rarely_until_it_loses():
    guard = Guard(period=4)
    seen = []
    for _ in range(4):
        seen.append(batches_to_next_pair(guard))
        feed(guard, stock=1.001, planned=1.0, pairs=5)  # so many are a proof
    assert seen == [4, 16, 64, 64]
    feed(guard, stock=1.0, planned=1.1, pairs=1)
    assert batches_to_next_pair(guard) == 4
    assert guard.dropped() == []


@pytest.mark.parametrize(
    ("planned", "batches"), [(0.99, 64), (0.9, 80), (0.8, 160), (0.6, 320), (0.0, 800)]
)
def test_what_the_pairs_of_a_plan_cost_that_gains_much_is_bounded(planned, batches):
    guard = Guard()
    assert batches_to_next_pair(guard) == PERIOD
    feed(guard, stock=1.0, planned=planned, pairs=1)
    assert batches_to_next_pair(guard) == batches
    assert 2 * (1.0 - planned) <= batches * 1.0 / 400 + 1e-9
    feed(guard, stock=1.0, planned=1.1, pairs=1)
    assert batches_to_next_pair(guard) == PERIOD


def test_buckets_are_judged_apart():
    guard = Guard(period=4)
    assert feed(guard, stock=1.0, planned=1.1, pairs=20) == 18
    assert feed(guard, stock=1.1, planned=1.0, pairs=20, key="other") is None
    assert not guard.runs_stock("other")


def test_a_noisy_plan_that_is_slower_by_more_than_the_noise_is_dropped():
    for seed in range(20):
        pairs = feed(Guard(period=4), 1.0, 1.04, 400, random.Random(seed))
        assert pairs is not None
        assert pairs < 200


@pytest.mark.parametrize("gain", [0.0, 0.02])
def test_false_alarms_are_as_rare_as_the_rule_says(gain):
    """A test of equal plans ends after some ten pairs; a drop is one in a thousand of these."""
    dropped = 0
    for seed in range(300):
        dropped += feed(Guard(period=4), 1.0, 1.0 - gain, 100, random.Random(seed)) is not None
    assert dropped <= (6 if gain == 0 else 0)


def test_ranks_that_are_fed_alike_decide_alike():
    draws = [random.Random(7), random.Random(7)]
    one, other = Guard(period=5), Guard(period=5)
    assert feed(one, 1.0, 1.01, 300, draws[0]) == feed(other, 1.0, 1.01, 300, draws[1])
    assert one == other


def test_a_second_batch_without_a_first_counts_for_nothing():
    guard = Guard()
    guard.runs_stock(KEY)
    assert not guard.add(KEY, is_stock=False, us=1.0, num_tokens=1)
    assert guard.buckets[KEY].pairs == 0
