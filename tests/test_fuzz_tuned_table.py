"""Arbitrary and damaged texts for the reader of tuned tables: a table, or line and field."""

import re

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tuned_tables import FUSE, WEAVE, bucket, table, tables

from sglang_tokenweave.tuning.nodes import TableError
from sglang_tokenweave.tuning.rows import plan_table
from sglang_tokenweave.tuning.text import from_text, to_text

fuzz = settings(deadline=None, derandomize=True, max_examples=200)
TEXT = to_text(table(bucket(64, FUSE), bucket(1024, WEAVE)))
WORDS = [*"[]{}-:,&*!?|>'\"#%@`~\n\t ", "---", "...", "<<", "off", "true", "1e9", ".inf", "0x10"]


def check(text):
    try:
        read = from_text(text)
    except TableError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert from_text(to_text(read)) == read
        plan_table(read)
    assert not refusal or re.match(r"line \d+[:,]", refusal)
    assert len(refusal) < 2000


@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS)).map("".join))
@example("\ud800")
@example("a: " + "[" * 5000)
@example("&a [*a]")
@example("- " * 4000)
@fuzz
def test_arbitrary_text(text):
    check(text)


@given(st.data())
@fuzz
def test_a_table_with_some_places_overwritten(data):
    text = TEXT
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        width = data.draw(st.integers(0, 12))
        text = (
            text[:at] + data.draw(st.sampled_from(WORDS) | st.text(max_size=3)) + text[at + width :]
        )
    check(text)


@given(st.data())
@fuzz
def test_lines_in_any_order_and_number(data):
    lines = TEXT.splitlines(keepends=True)
    kept = data.draw(st.lists(st.sampled_from(lines), max_size=12))
    at = data.draw(st.integers(0, len(lines)))
    check("".join([*lines[:at], *kept, *lines[at + data.draw(st.integers(0, 3)) :]]))


@given(tables)
@fuzz
def test_every_table_becomes_a_planners(drawn):
    assert {row.kind for row in plan_table(drawn).rows} <= {"off", "fuse", "weave"}
