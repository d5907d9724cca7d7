"""Arbitrary and damaged entries of the kernels' cache: the right kernel, or one warning."""

import json
import logging
from dataclasses import replace

import pytest
from compiling import compile_with, write_sources
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_tokenweave import compiler

fuzz = settings(deadline=None, derandomize=True, max_examples=200)


class Cache:
    """A folder with one entry that NVRTC made; what is compiled from then on has another name."""

    def __init__(self, folder):
        self.compile = compile_with(write_sources(folder), folder / "cache")
        self.good = self.compile()
        (self.entry,) = (folder / "cache").iterdir()
        self.content = self.entry.read_bytes()
        self.again = replace(self.good, name="compiled again")
        self.warnings = []


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    made = Cache(tmp_path_factory.mktemp("fuzz"))
    handler = logging.Handler()
    handler.emit = lambda record: made.warnings.append(record.getMessage())
    compiler.logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_compile", lambda *_: made.again)
        yield made
    compiler.logger.removeHandler(handler)


def check(cache, content):
    """Put `content` in the entry's place: only the entry itself is taken, and nothing raises."""
    compiler._warn.cache_clear()
    cache.warnings.clear()
    cache.entry.write_bytes(content)
    if content == cache.content:
        assert cache.compile() == cache.good
        assert cache.warnings == []
    else:
        assert cache.compile() == cache.again
        (warning,) = cache.warnings
        assert str(cache.entry) in warning
        assert cache.compile() == cache.again, "the replacement was not taken"
        assert len(cache.warnings) == 1


@given(st.binary(max_size=300))
@example(b"")
@fuzz
def test_arbitrary_bytes(cache, content):
    check(cache, content)


@given(st.data())
@fuzz
def test_truncations(cache, data):
    length = data.draw(st.integers(0, len(cache.content)) | st.integers(0, 200))
    check(cache, cache.content[:length])


@given(st.data())
@fuzz
def test_flipped_bits(cache, data):
    places = st.integers(0, 8 * len(cache.content) - 1) | st.integers(0, 8 * 500)
    damaged = bytearray(cache.content)
    for place in data.draw(st.sets(places, max_size=4)):
        damaged[place // 8] ^= 1 << place % 8
    check(cache, bytes(damaged))


headers = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["name", "resources", "ptx"]), inner)
    ),
).map(json.dumps)


@given(headers.map(str.encode) | st.binary(max_size=20))
@example(b"[" * 5000)
@fuzz
def test_other_content_under_its_own_checksum(cache, header):
    body = header + b"\ncubin"
    check(cache, compiler._checksum(cache.entry.stem, body) + b"\n" + body)


@given(st.data())
@fuzz
def test_spliced_pieces(cache, data):
    """The pieces between newlines, in any order and number: checksum, header, machine code."""
    pieces = st.sampled_from(cache.content.split(b"\n", 2)) | st.binary(max_size=9)
    check(cache, b"\n".join(data.draw(st.lists(pieces, max_size=4))))
