"""Cutting a batch and putting it together again."""

from itertools import accumulate

import pytest
import torch
from batches import make_batch
from hypothesis import given
from hypothesis import strategies as st

from sglang_tokenweave.split import UnsplittableError, cut_batch, cut_requests, spans

lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(
    lambda lengths: sum(lengths) >= 2
)


@given(lengths=lengths_strategy, data=st.data())
def test_halves_together_are_the_batch(lengths, data):
    prefixes = data.draw(st.lists(st.integers(0, 50), min_size=len(lengths), max_size=len(lengths)))
    cut = data.draw(st.integers(1, sum(lengths) - 1))
    batch = make_batch(lengths, prefixes)
    first, second = cut_batch(batch, cut)

    for name in ("input_ids", "positions", "out_cache_loc"):
        joined = torch.cat([getattr(first, name), getattr(second, name)])
        assert torch.equal(joined, getattr(batch, name))
    assert len(first.input_ids) == cut == first.extend_num_tokens

    # Each token keeps its request, its position, and the number of tokens it may look back on.
    def tokens(part):
        return [
            (rid, prefix + index)
            for rid, prefix, length in zip(
                part.rids, part.extend_prefix_lens_cpu, part.extend_seq_lens_cpu, strict=True
            )
            for index in range(length)
        ]

    assert tokens(first) + tokens(second) == tokens(batch)
    for part in (first, second):
        assert part.seq_lens_cpu.tolist() == [
            prefix + length
            for prefix, length in zip(
                part.extend_prefix_lens_cpu, part.extend_seq_lens_cpu, strict=True
            )
        ]
        assert part.seq_lens_sum == int(part.seq_lens_cpu.sum())
        assert part.batch_size == len(part.rids) == len(part.req_pool_indices)
        assert min(part.extend_seq_lens_cpu) >= 1
        assert part.extend_start_loc.tolist() == [
            0,
            *accumulate(part.extend_seq_lens_cpu[:-1]),
        ]
        for name in ("seq_lens", "extend_seq_lens", "extend_prefix_lens"):
            assert getattr(part, name).tolist() == list(getattr(part, f"{name}_cpu"))
        assert int(part.num_token_non_padded) == len(part.input_ids)
        assert not part.forward_metadata_ready
        assert part.sampling_info is None


@given(lengths=lengths_strategy, data=st.data())
def test_the_batch_itself_stays_as_it_was(lengths, data):
    cut = data.draw(st.integers(1, sum(lengths) - 1))
    batch = make_batch(lengths, [3] * len(lengths))
    again = make_batch(lengths, [3] * len(lengths))
    cut_batch(batch, cut)
    assert batch.extend_seq_lens_cpu == again.extend_seq_lens_cpu
    for name in ("seq_lens", "seq_lens_cpu", "extend_seq_lens", "extend_prefix_lens"):
        assert torch.equal(getattr(batch, name), getattr(again, name))


@given(size=st.integers(2, 64), data=st.data())
def test_decode_batches_are_cut_between_requests(size, data):
    cut = data.draw(st.integers(1, size - 1))
    batch = make_batch([1] * size, list(range(size)), decode=True)
    first, second = cut_batch(batch, cut)
    assert (first.batch_size, second.batch_size) == (cut, size - cut)
    assert first.rids + second.rids == batch.rids
    assert torch.equal(torch.cat([first.seq_lens, second.seq_lens]), batch.seq_lens)
    assert first.extend_num_tokens is None
    assert first.seq_lens_sum + second.seq_lens_sum == batch.seq_lens_sum


@given(lengths=lengths_strategy, data=st.data())
def test_spans_cover_every_token_once(lengths, data):
    cut = data.draw(st.integers(1, sum(lengths) - 1))
    first, second = spans(tuple(lengths), cut)
    for span in (first, second):
        covered = sum(lengths[span.requests]) - span.skipped - span.dropped
        assert covered == span.tokens.stop - span.tokens.start
    assert first.tokens.stop == second.tokens.start == cut
    assert (first.tokens.start, second.tokens.stop) == (0, sum(lengths))


@pytest.mark.parametrize("cut", [-1, 0, 10, 11])
def test_a_cut_outside_the_batch_is_refused(cut):
    with pytest.raises(ValueError, match="not inside a batch of 10 tokens"):
        spans((4, 6), cut)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"surprise": torch.zeros(1)}, "field surprise"),
        ({"unknown_flag": True}, "field unknown_flag"),
        ({"mm_inputs": [None, object()]}, "field mm_inputs"),
        ({"input_ids": torch.zeros(16)}, "batch is padded"),
        ({"extend_seq_lens_cpu": None}, "request lengths are on the device only"),
        ({"seq_lens_cpu": None}, "sequence lengths are on the device only"),
    ],
)
def test_what_is_not_understood_is_not_split(change, reason):
    batch = make_batch([4, 6], [0, 0])
    for name, value in change.items():
        setattr(batch, name, value)
    with pytest.raises(UnsplittableError, match=reason):
        cut_batch(batch, 5)


def test_entries_of_none_are_no_surprise():
    batch = make_batch([4, 6], [0, 0])
    batch.mm_inputs = [None, None]
    assert cut_batch(batch, 5)[0].batch_size == 2


@given(lengths_strategy, st.data())
def test_requests_cut_on_the_cpu_are_those_of_the_halves(lengths, data):
    prefixes = data.draw(st.lists(st.integers(0, 50), min_size=len(lengths), max_size=len(lengths)))
    cut = data.draw(st.integers(1, sum(lengths) - 1))
    batch = make_batch(lengths, prefixes)
    for own, part in zip(cut_requests(batch, cut), cut_batch(batch, cut), strict=True):
        assert torch.equal(batch.req_pool_indices[own.rows], part.req_pool_indices)
        assert list(own.lengths) == part.extend_seq_lens.tolist()
        assert list(own.prefixes) == part.extend_prefix_lens.tolist()
        assert list(own.ends) == part.seq_lens.tolist()


def test_requests_whose_lengths_only_the_device_knows_are_not_cut():
    batch = make_batch([4, 6], [0, 0])
    batch.extend_prefix_lens_cpu = None
    with pytest.raises(UnsplittableError, match="prefix lengths"):
        cut_requests(batch, 5)
