"""The chunk budget: totals of whole tiles, and never a pass that stands still."""

import inspect
from types import SimpleNamespace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sglang_tokenweave.chunks import aligned_budget, nudge_chunk_budget

budgets = st.integers(1, 20000)
decodes = st.integers(0, 600)
pages = st.sampled_from((1, 2, 16, 64, 128, 256, 512, 1024))
tiles = st.sampled_from((1, 64, 128, 256))
floors = st.sampled_from((0, 1, 512, 1024, 5000))


@given(budgets, decodes, pages, tiles, floors)
@settings(deadline=None)
def test_a_budget_only_shrinks_and_by_a_tile_and_a_page_at_most(budget, decode, page, tile, floor):
    aligned = aligned_budget(budget, decode, page, tile, floor=floor)
    assert budget - tile - page < aligned <= budget
    if aligned != budget:
        assert aligned >= max(floor, page)
        assert aligned % page == 0


@given(budgets, decodes, tiles, floors)
@settings(deadline=None)
def test_totals_are_whole_tiles_with_pages_of_one_token(budget, decode, tile, floor):
    aligned = aligned_budget(budget, decode, 1, tile, floor=floor)
    whole = next(b for b in range(budget, budget - tile, -1) if (b + decode) % tile == 0)
    assert aligned == (whole if whole >= max(floor, 1) else budget)


@given(budgets, decodes, pages, tiles, floors)
@settings(deadline=None)
def test_larger_pages_come_as_near_to_whole_tiles_as_they_can(budget, decode, page, tile, floor):
    aligned = aligned_budget(budget, decode, page, tile, floor=floor)

    def unfilled(chunk):
        return -(chunk + decode) % tile

    assert unfilled(aligned) <= unfilled(budget)
    if budget - tile - page >= max(floor, page):
        assert unfilled(aligned) <= unfilled(budget // page * page)
        assert unfilled(aligned) < page


@pytest.mark.parametrize(
    ("budget", "decode", "page", "expected"),
    [
        (8192, 0, 1, 8192),
        (8191, 0, 1, 7936),
        (8192 - 17, 17, 1, 8175),  # a mixed batch of 8192: nothing to do
        (6000 - 17, 17, 1, 5888 - 17),
        (6000 - 17, 17, 64, 5824),  # 5824 + 17 = 23 tiles less 47 tokens; stock is 111 short
        (6000, 0, 64, 5888),
        (6000, 0, 512, 5632),  # SGLang's own rounding, but for every chunk of a request
        (7700, 17, 512, 7700),  # 7680 and 7168 leave the last tile emptier
        (8150, 17, 64, 8150),  # so does 8128
        (7936, 0, 512, 7936),  # 31 tiles already
        (1100, 0, 1, 1024),
        (1023, 0, 1, 1023),  # 768 would be below the floor
        (300, 0, 256, 300),
        (0, 17, 1, 0),
        (-5, 17, 1, -5),
        (None, 17, 1, None),
    ],
)
def test_known_budgets(budget, decode, page, expected):
    assert aligned_budget(budget, decode, page, floor=1024) == expected


def test_a_page_is_the_least_even_without_a_floor():
    assert aligned_budget(100, 0, 64, floor=0) == 100
    assert aligned_budget(300, 0, 64, floor=0) == 256
    assert aligned_budget(300, 200, 64, floor=0) == 300  # 56 would be less than a page


@pytest.mark.parametrize(
    ("decode", "page", "tile", "message"),
    [
        (-1, 1, 256, "num_mixed_decode_tokens: got -1; expected at least 0"),
        (0, 0, 256, "page_size: got 0; expected at least 1"),
        (0, 1, 0, "tile: got 0; expected at least 1"),
    ],
)
def test_nonsense_is_refused(decode, page, tile, message):
    with pytest.raises(ValueError, match=message):
        aligned_budget(8192, decode, page, tile, floor=1024)


class PrefillAdder:
    """The leading parameters and the attributes that the hook relies on."""

    def __init__(self, page_size, rem_chunk_tokens, num_mixed_decode_tokens=0, dllm_config=None):
        self.page_size = page_size
        self.rem_chunk_tokens = rem_chunk_tokens
        self.dllm_config = dllm_config
        if rem_chunk_tokens is not None:
            self.rem_chunk_tokens -= num_mixed_decode_tokens


def nudged(adder_type, *args, **kwargs):
    """Do what SGLang's registry does for an AFTER hook on `__init__`."""
    adder = adder_type(*args, **kwargs)
    assert nudge_chunk_budget(None, adder, *args, **kwargs) is None
    return adder


def test_the_hook_finds_the_mixed_tokens_however_they_are_passed():
    assert nudged(PrefillAdder, 1, 6000, 17).rem_chunk_tokens == 5888 - 17
    assert nudged(PrefillAdder, 1, 6000, num_mixed_decode_tokens=17).rem_chunk_tokens == 5888 - 17
    assert nudged(PrefillAdder, page_size=1, rem_chunk_tokens=6000).rem_chunk_tokens == 5888


def test_the_hook_leaves_alone_what_has_no_chunk_budget():
    assert nudged(PrefillAdder, 1, None, 17).rem_chunk_tokens is None
    assert nudged(PrefillAdder, 1, 6000, 17, dllm_config=object()).rem_chunk_tokens == 6000 - 17


@given(st.integers(1, 20000), st.integers(0, 600), pages)
@example(chunk=4200, decode=50, page=1)
@settings(deadline=None)
def test_a_budget_that_holds_a_power_of_two_still_does(chunk, decode, page):
    # With deterministic inference SGLang floors chunks to a multiple of a power of two (4096).
    stock = PrefillAdder(page, chunk, decode).rem_chunk_tokens
    ours = nudged(PrefillAdder, page, chunk, decode).rem_chunk_tokens
    for power in range(15):
        assert (ours >= 1 << power) == (stock >= 1 << power) or stock < 1


def test_an_unknown_adder_is_refused_by_name():
    class Changed:
        def __init__(self, page_size, mixed=0):
            self.page_size, self.rem_chunk_tokens, self.dllm_config = page_size, 6000, None

    with pytest.raises(TypeError, match="has no parameter num_mixed_decode_tokens"):
        nudged(Changed, 1)


@pytest.fixture(scope="module")
def policy():
    """SGLang's module with the real PrefillAdder, and the flags of a server that has none set."""
    name = "sglang.srt.managers.schedule_policy"
    module = pytest.importorskip(name, reason="SGLang cannot be imported", exc_type=ImportError)
    features = SimpleNamespace(enable_encoder_swa_bounded_replay=False)
    flags = {
        "get_schedule": SimpleNamespace(schedule_policy="fcfs"),
        "get_exec": SimpleNamespace(features=features),
        "is_dsa_prefill_cp_in_seq_split": False,
        "is_prefill_context_parallel_enabled": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in flags.items():  # not all of them in every release
            patch.setattr(module, name, lambda value=value: value, raising=False)
        yield module


class Request:
    """What PrefillAdder reads and writes of a request, without a tokenizer or a KV cache."""

    def __init__(self, num_tokens):
        self.full_untruncated_fill_ids = range(num_tokens)
        self.origin_input_ids = range(num_tokens)
        self.prefix_indices, self.prefix_len = range(0), 0
        self.extend_end = 0
        self.output_ids = []
        self.sampling_params = SimpleNamespace(max_new_tokens=4, ignore_eos=False)
        self.last_node = None
        self.host_hit_length = self.swa_host_hit_length = self.auxiliary_swa_host_hit_length = 0
        self.retracted_stain = self.is_retracted = False
        self.kv = SimpleNamespace(holds_mamba=False, req_pool_idx=0)

    def needs_host_load_back(self):
        return False

    def set_extend_range(self, start, end):
        assert start == self.prefix_len
        self.extend_end = end

    @property
    def extend_len(self):
        return self.extend_end - self.prefix_len

    @property
    def extend_range(self):
        return SimpleNamespace(length=self.extend_len)

    def advance(self):
        self.prefix_indices, self.prefix_len = range(self.extend_end), self.extend_end


def real_arguments(page_size, chunk, decode):
    """Arguments as the scheduler passes them, with a fake cache that holds nothing."""
    receipt = SimpleNamespace(to_dec_params=lambda: None)
    tree_cache = SimpleNamespace(
        disable=True,
        evictable_size=lambda: 0,
        supports_mamba=lambda: False,
        supports_prefix_sharing=lambda: False,
        is_tree_cache=lambda: False,
        inc_lock_ref=lambda node: receipt,
        dec_lock_ref=lambda *args: None,
        lock=lambda node: None,
        unlock=lambda lock: None,
    )
    allocator = SimpleNamespace(
        page_size=page_size,
        available_size=lambda: 10**7,
        request_slot_reserve=lambda **kwargs: 0,
    )

    def create_prefill_budget(tree_cache, *, num_mixed_decode_tokens=0):
        from sglang.srt.mem_cache.prefill_budget import PrefillBudget

        return PrefillBudget(allocator, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    allocator.create_prefill_budget = create_prefill_budget
    return page_size, tree_cache, allocator, None, 0.5, 16384, chunk, decode


def one_pass(adder, waiting, chunked, align):
    """Admit as the scheduler does; return the admitted requests and the unfinished one."""
    # Statistics only; they want a server's runtime context.
    adder._account_prefill_cache_admission = lambda *args, **kwargs: None
    if chunked is not None:
        chunked = adder.add_chunked_req(chunked)
    for request in waiting:
        result = adder.add_one_req(
            request, has_chunked_req=chunked is not None, truncation_align_size=align
        )
        if result.name != "CONTINUE":
            break
    return adder.can_run_list, adder.new_chunked_req or chunked


@given(
    st.lists(st.integers(1, 12000), min_size=1, max_size=5),
    st.integers(600, 9000),
    st.integers(0, 500),
    st.sampled_from((1, 16, 64)),
    st.sampled_from((None, None, 1024, 4096)),
)
@settings(deadline=None, max_examples=150)
def test_a_real_pass_that_admits_something_still_does(
    policy, lengths, chunk, decode, page_size, align
):
    # A chunk below that alignment cannot be cut at all, by stock SGLang either.
    assume(align is None or chunk - decode >= align)
    arguments = real_arguments(page_size, chunk, decode)
    stock, _ = one_pass(policy.PrefillAdder(*arguments), map(Request, lengths), None, align)
    ours, _ = one_pass(nudged(policy.PrefillAdder, *arguments), map(Request, lengths), None, align)
    assert bool(ours) == bool(stock)
    admitted = [sum(request.extend_len for request in batch) for batch in (ours, stock)]
    assert admitted[0] <= admitted[1]


@given(
    st.lists(st.integers(1, 12000), min_size=1, max_size=5),
    st.integers(600, 9000),
    st.integers(0, 500),
    st.sampled_from((1, 16, 64)),
)
@settings(deadline=None, max_examples=100)
def test_real_passes_get_every_request_through(policy, lengths, chunk, decode, page_size):
    waiting, chunked, totals = [Request(length) for length in lengths], None, []
    while waiting or chunked:
        adder = nudged(policy.PrefillAdder, *real_arguments(page_size, chunk, decode))
        budget = adder.rem_chunk_tokens
        admitted, chunked = one_pass(adder, waiting, chunked, None)
        tokens = sum(request.extend_len for request in admitted)
        assert 0 < tokens <= max(budget, page_size)
        if budget != chunk - decode and tokens == budget:
            totals.append(tokens + decode)
        for request in admitted:
            request.advance()
        waiting = [request for request in waiting if request not in admitted]
    assert all(-total % 256 < page_size for total in totals)


def test_a_real_chunk_ends_a_tile(policy):
    arguments = real_arguments(page_size=1, chunk=6000, decode=17)
    adder = nudged(policy.PrefillAdder, *arguments)
    admitted, chunked = one_pass(adder, [Request(9000)], None, None)
    assert admitted == [chunked]
    assert chunked.extend_len + 17 == 23 * 256


def test_the_real_adder_names_its_mixed_tokens(policy):
    parameters = list(inspect.signature(policy.PrefillAdder.__init__).parameters)
    assert parameters[1:9][-2:] == ["rem_chunk_tokens", "num_mixed_decode_tokens"]
