"""The search on a simulated noisy machine: what it finds, what it runs, when it stops."""

import random
from dataclasses import replace

import pytest

from sglang_tokenweave.plan import Kind, Mode
from sglang_tokenweave.tuning.halving import FINAL_ROUNDS, RUN_OFF_ROUNDS
from sglang_tokenweave.tuning.search import search
from sglang_tokenweave.tuning.space import Space, bucket_sizes
from sglang_tokenweave.tuning.table import LEAST_ROUNDS, OFF, Candidate

SPACE = Space(sms=132, ctas=(0, 4, 8, 16), fuse_ctas=(8, 16, 32))
SIZES = [
    *((Mode.PREFILL, tokens) for tokens in bucket_sizes(8192, 128)),
    *((Mode.DECODE, tokens) for tokens in bucket_sizes(256, 8)),
]


class Machine:
    """Costs drawn at random; each run errs, and now and then something else runs beside it."""

    def __init__(
        self,
        seed,
        us_per_token=1.0,
        error=0.005,
        spikes=0.03,
        spread=0.3,
        prepare_s=0.0,
        prepare_decode_s=None,
        load_s=0.0,
    ):
        self._load_us = 1e6 * load_s  # when the first of a kind is prepared
        self._draw = random.Random(seed)
        self._us_per_token, self._error, self._spikes = us_per_token, error, spikes
        self._spread, self._prepare_us = spread, dict.fromkeys(Mode, 1e6 * prepare_s)
        if prepare_decode_s is not None:
            self._prepare_us[Mode.DECODE] = 1e6 * prepare_decode_s
        self._prepared = set()  # graphs of one size
        self._kinds = set()  # that have run
        self._factors = {}
        self.spent_us = 0.0
        self.runs = []

    def cost_us(self, candidate, mode, tokens):
        """Return what a run takes without any error."""
        key = (candidate, mode, tokens)
        if key not in self._factors:
            away = 0 if candidate == OFF else self._draw.uniform(-self._spread, self._spread)
            self._factors[key] = 1 + away
        return self._us_per_token * (tokens + 300) * self._factors[key]

    def measure(self, candidates, mode, tokens, rounds):
        times = [[] for _ in candidates]
        self._prepared = {each for each in self._prepared if each[1:] == (mode, tokens)}
        new = {(candidate, mode, tokens) for candidate in candidates} - self._prepared
        first = {(candidate.kind, candidate.ctas) for candidate in candidates} - self._kinds
        self.spent_us += len(new) * self._prepare_us[mode] + len(first) * self._load_us
        self._prepared |= new
        self._kinds |= first
        for _ in range(rounds):
            for candidate, found in zip(candidates, times, strict=True):
                us = self.cost_us(candidate, mode, tokens) * self._draw.gauss(1, self._error)
                us *= 1.5 if self._draw.random() < self._spikes else 1
                self.spent_us += us
                self.runs.append((candidate, mode, tokens))
                found.append(us)
        return times

    def spent_s(self):
        return self.spent_us / 1e6


@pytest.mark.parametrize("spread", [0.02, 0.06, 0.3])
def test_the_choice_is_within_two_percent_of_the_best(spread):
    worst, wrong = [], 0
    for seed in range(60):
        machine = Machine(seed, spread=spread)
        found = list(search(SIZES, SPACE, machine.measure, machine.spent_s, 90))
        assert sorted((each.mode, each.tokens) for each in found) == sorted(SIZES)
        for each in found:
            costs = {
                candidate: machine.cost_us(candidate, each.mode, each.tokens)
                for candidate in SPACE.candidates(each.mode, each.tokens)
            }
            worst.append(costs[each.chosen] / min(costs.values()))
            assert costs[each.chosen] <= costs[OFF]
            wrong += each.chosen != OFF and worst[-1] > 1.02
    # OFF may stay where a gain of hardly more than 2 % was measured as hardly less than the noise,
    # in which an exhaustive search would not see it, either; or, once in a thousand, where four of
    # fifteen runs of the better one were disturbed, for which another one may win, too.
    assert sum(loss > 1.02 for loss in worst) <= len(worst) / 300
    assert wrong <= 1
    assert max(worst) < 1.04


def test_a_noisy_machine_is_looked_at_twice():
    """Runs that err by 3 %: without a run-off 119 of 780 choices lose more than 2 %, with it 38."""
    losses = []
    for seed in range(60):
        machine = Machine(seed, spread=0.06, error=0.03)
        for each in search(SIZES, SPACE, machine.measure, machine.spent_s, 90):
            candidates = SPACE.candidates(each.mode, each.tokens)
            best = min(machine.cost_us(one, each.mode, each.tokens) for one in candidates)
            losses.append(machine.cost_us(each.chosen, each.mode, each.tokens) / best)
            assert each.time_of(OFF).rounds in (FINAL_ROUNDS, RUN_OFF_ROUNDS)
            assert each.time_of(each.chosen).rounds == each.time_of(OFF).rounds
    assert sum(loss > 1.02 for loss in losses) <= len(losses) / 15  # chance: 38 +- 6 of 780


@pytest.mark.parametrize(("budget_s", "is_found"), [(90, True), (0.6, False)])
def test_one_that_was_dropped_for_short_times_of_others_comes_back(budget_s, is_found):
    """If there is time for it."""
    machine = Machine(1, spread=0.0, spikes=0.0, error=0.0)
    candidates = SPACE.candidates(Mode.PREFILL, 4096)
    best, lucky = candidates[5], candidates[7:9]
    machine._factors[best, Mode.PREFILL, 4096] = 0.9
    runs = 0

    def measure(tried, mode, tokens, rounds):
        nonlocal runs
        times = machine.measure(tried, mode, tokens, rounds)
        for each, found in zip(tried, times, strict=True):
            if rounds and each in lucky and runs < 114:  # until two are left beside OFF
                found[0] *= 0.8
        runs += rounds * len(tried)
        return times

    (found,) = search([(Mode.PREFILL, 4096)], SPACE, measure, machine.spent_s, budget_s)
    assert found.chosen == (best if is_found else OFF)
    assert found.time_of(best).rounds == (RUN_OFF_ROUNDS if is_found else 12)
    assert found.time_of(OFF).rounds == (RUN_OFF_ROUNDS if is_found else FINAL_ROUNDS)


def test_it_takes_half_the_runs_of_an_exhaustive_search():
    machine = Machine(1)
    list(search([(Mode.PREFILL, 4096)], SPACE, machine.measure, machine.spent_s, 90))
    candidates = SPACE.candidates(Mode.PREFILL, 4096)
    assert len(candidates) == 16
    assert len(machine.runs) == 114 + 2 < FINAL_ROUNDS * len(candidates) / 2


def test_off_runs_in_every_round():
    machine = Machine(2)
    (found,) = search([(Mode.PREFILL, 4096)], SPACE, machine.measure, machine.spent_s, 90)
    rounds = {each.candidate: each.rounds for each in found.measured}
    assert rounds[OFF] == max(rounds.values()) == FINAL_ROUNDS
    assert sorted(rounds.values()) == [3] * 7 + [6] * 4 + [12] * 2 + [FINAL_ROUNDS] * 3


def test_candidates_that_are_all_alike_leave_off_in_place():
    wrong = 0
    for seed in range(60):
        machine = Machine(seed, spread=0.0, error=0.01)
        found = search([(Mode.PREFILL, 4096)], SPACE, machine.measure, machine.spent_s, 90)
        wrong += sum(each.chosen != OFF for each in found)
    assert wrong <= 2  # fifteen rivals, of which one in some thousand passes by accident


@pytest.mark.parametrize("us_per_token", [30, 100, 400, 3000, 100_000])
def test_the_budget_is_kept_on_slow_machines(us_per_token):
    machine = Machine(3, us_per_token=us_per_token)
    found = list(search(SIZES, SPACE, machine.measure, machine.spent_s, 90))
    # What is not known beforehand is the first round of the smallest size alone.
    first_s = 16 * (128 + 300) * us_per_token * 1.5 / 1e6
    assert machine.spent_s() <= max(90 * 1.03, first_s)
    for each in found:
        off = each.time_of(OFF)
        assert off.rounds >= LEAST_ROUNDS
        assert each.time_of(each.chosen).rounds == off.rounds
    if us_per_token <= 400:
        assert len(found) == len(SIZES)


@pytest.mark.parametrize("prepare_s", [0.1, 0.4, 1.0])
def test_graphs_that_have_to_be_captured_are_in_the_budget(prepare_s):
    """An eager try costs little; a graph of 80 layers takes up to a second, for each size."""
    lost = []
    for seed in range(20):
        machine = Machine(seed, us_per_token=40, prepare_s=prepare_s, spread=0.1)
        found = list(search(SIZES, SPACE, machine.measure, machine.spent_s, 90))
        assert machine.spent_s() <= 90 * 1.03
        assert sorted((each.mode, each.tokens) for each in found) == sorted(SIZES)
        for each in found:
            rivals = [one.candidate for one in each.measured]
            best = min(machine.cost_us(one, each.mode, each.tokens) for one in rivals)
            lost.append(machine.cost_us(each.chosen, each.mode, each.tokens) / best)
    assert sum(loss > 1.02 for loss in lost) <= len(lost) / 50


@pytest.mark.parametrize("load_s", [1.0, 4.0])
def test_what_is_loaded_once_is_not_taken_for_what_each_size_takes(load_s):
    """Kernels are compiled when the first candidate of a kind comes: seconds, of a tenth later."""
    for seed in range(20):
        machine = Machine(seed, us_per_token=2, prepare_s=0.05, load_s=load_s)
        found = list(search(SIZES, SPACE, machine.measure, machine.spent_s, 90))
        assert machine.spent_s() <= 90 * 1.03
        assert sorted((each.mode, each.tokens) for each in found) == sorted(SIZES)


@pytest.mark.parametrize(("prepare_s", "prepare_decode_s"), [(0.2, 0.7), (0.3, 1.2), (0.3, 2.0)])
@pytest.mark.parametrize("budget_s", [60, 90])
def test_decodes_get_their_time_though_preparing_them_takes_longer(
    prepare_s, prepare_decode_s, budget_s
):
    """As on two H200 and a slow CPU, whose prefills left time for the smallest decodes alone."""
    space = replace(SPACE, has_one_shot=True, alike_tokens=1024, smallest_woven_decode=256)
    sizes = [
        *((Mode.PREFILL, tokens) for tokens in bucket_sizes(8192, 64)),
        *((Mode.DECODE, tokens) for tokens in bucket_sizes(512, 1)),
    ]
    for seed in range(10):
        machine = Machine(
            seed,
            us_per_token=3.5,
            prepare_s=prepare_s,
            prepare_decode_s=prepare_decode_s,
            load_s=1,
        )
        found = list(search(sizes, space, machine.measure, machine.spent_s, budget_s))
        assert machine.spent_s() <= budget_s * 1.03
        assert sorted((each.mode, each.tokens) for each in found) == sorted(sizes)
        (largest,) = (each for each in found if (each.mode, each.tokens) == (Mode.DECODE, 512))
        assert Kind.FUSE in {each.candidate.kind for each in largest.measured}


def test_without_time_nothing_is_measured_and_nothing_found():
    machine = Machine(4)
    assert list(search(SIZES, SPACE, machine.measure, machine.spent_s, 0)) == []
    assert machine.runs == []


def test_all_ranks_run_the_same():
    """They see the same times and the same clock, so they make the same calls."""
    one, other = Machine(5), Machine(5)
    found = [
        list(search(SIZES, SPACE, machine.measure, machine.spent_s, 20)) for machine in (one, other)
    ]
    assert found[0] == found[1]
    assert one.runs == other.runs


def test_candidates_fit_the_batch_and_the_gpu():
    assert SPACE.candidates(Mode.DECODE, 1) == SPACE.candidates(Mode.PREFILL, 1)
    assert {each.kind for each in SPACE.candidates(Mode.DECODE, 1)} == {Kind.OFF, Kind.FUSE}
    graphs = replace(SPACE, smallest_woven_decode=256)
    kinds = [{each.kind for each in graphs.candidates(Mode.DECODE, n)} for n in (255, 256)]
    assert kinds == [{Kind.OFF, Kind.FUSE}, {Kind.OFF, Kind.FUSE, Kind.WEAVE}]
    decode = SPACE.candidates(Mode.DECODE, 4096)
    assert {each.cut_offset for each in decode} == {0}
    assert {each.cut_offset for each in SPACE.candidates(Mode.PREFILL, 1023)} == {0}
    assert {each.cut_offset for each in SPACE.candidates(Mode.PREFILL, 1024)} == {-256, 0, 256}
    small = Space(sms=24, ctas=(4, 8, 16), fuse_ctas=(8,))
    assert {each.ctas for each in small.candidates(Mode.PREFILL, 64)} == {0, 4, 8}
    assert decode[0] == OFF
    assert len(set(decode)) == len(decode)


def test_the_one_shot_op_is_tried_on_few_tokens():
    with_it = replace(SPACE, has_one_shot=True)
    for mode in (Mode.PREFILL, Mode.DECODE):
        tried = [
            [each for each in with_it.candidates(mode, n) if each.is_one_shot] for n in (1, 512)
        ]
        assert tried == 2 * [[Candidate(Kind.FUSE)]]
        assert not any(each.is_one_shot for each in with_it.candidates(mode, 513))
        assert not any(each.is_one_shot for each in SPACE.candidates(mode, 1))


def test_ops_that_are_the_same_whatever_their_ctas_are_tried_once():
    alike = replace(SPACE, has_one_shot=True, alike_tokens=1024)
    for mode in (Mode.PREFILL, Mode.DECODE):
        tried = [
            [each.fuse_ctas for each in alike.candidates(mode, n) if each.kind is Kind.FUSE]
            for n in (512, 1024, 1025)
        ]
        assert tried == [[0, 8], [8], [8, 16, 32]]


@pytest.mark.parametrize(
    ("largest", "smallest", "sizes"),
    [(512, 64, [64, 128, 256, 512]), (600, 256, [256, 512, 600]), (8, 8, [8]), (7, 8, [])],
)
def test_sizes(largest, smallest, sizes):
    assert bucket_sizes(largest, smallest) == sizes
