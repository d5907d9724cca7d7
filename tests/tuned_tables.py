"""Tuned tables that people could have, and how to draw arbitrary ones."""

from hypothesis import strategies as st

from sglang_tokenweave.plan import MOST_ONE_SHOT_TOKENS, Kind, Mode
from sglang_tokenweave.tuning.table import OFF, Bucket, Candidate, Key, Measurement, Table

KEY = Key(
    gpu="NVIDIA H200",
    sms=132,
    driver="580.95.05",
    model="LlamaForCausalLM",
    hidden=8192,
    heads=64,
    kv_heads=8,
    head_dim=128,
    intermediate=28672,
    experts=1,
    top_k=1,
    layers=80,
    dtype="bfloat16",
    quantization="none",
    tp_size=8,
    transport="peer",
    sglang="0.5.23",
    tokenweave="0.1.0",
)
FUSE = Candidate(Kind.FUSE, fuse_ctas=16)
WEAVE = Candidate(Kind.WEAVE, ctas=8, fuse_ctas=16)


def bucket(tokens, chosen=OFF, mode=Mode.PREFILL, *, off=100.0, fuse=90.0, weave=80.0):
    """Return a bucket in which all three were measured."""
    times = {OFF: off, FUSE: fuse}
    if tokens > 1:
        times[WEAVE] = weave
    measured = tuple(Measurement(candidate, us, 1.0, 15) for candidate, us in times.items())
    return Bucket(mode, tokens, chosen, measured)


def table(*buckets, key=KEY):
    return Table(key, "2026-11-24T15:00:00Z", buckets)


_ctas = st.integers(1, 24).map(lambda pairs: 2 * pairs)
candidates = st.one_of(
    st.builds(Candidate, st.just(Kind.FUSE), fuse_ctas=st.just(0) | _ctas),
    st.builds(Candidate, st.just(Kind.WEAVE), st.integers(-999, 999), st.just(0) | _ctas, _ctas),
)
times = st.integers(1, 10**9).map(lambda tenths: tenths / 10)


@st.composite
def buckets(draw):
    tokens = draw(st.integers(2, 20_000))
    others = draw(st.lists(candidates, max_size=4, unique=True))
    measured = tuple(
        Measurement(each, draw(times), draw(times), draw(st.integers(1, 20)))
        for each in [OFF, *others]
        if not each.is_one_shot or tokens <= MOST_ONE_SHOT_TOKENS
    )
    chosen = draw(st.sampled_from(measured)).candidate
    return Bucket(draw(st.sampled_from([Mode.PREFILL, Mode.DECODE])), tokens, chosen, measured)


names = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20)
keys = names.map(lambda name: Key(**{**vars(KEY), "gpu": name, "driver": name[::-1]}))
tables = st.builds(
    Table,
    keys,
    names,
    st.lists(buckets(), max_size=6, unique_by=lambda each: (each.mode, each.tokens)).map(tuple),
)
