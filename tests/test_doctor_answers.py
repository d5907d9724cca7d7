"""Answers of the doctor's probes travel as text and come back as they were."""

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_tokenweave.doctor.answers import from_text, to_text
from sglang_tokenweave.doctor.facts import Cuda, Failure, Nvml, Nvrtc, Sglang

answers = st.one_of(*map(st.from_type, (Cuda, Failure, Nvml, Nvrtc, Sglang)))


@given(answers)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_an_answer_comes_back_as_it_was(answer):
    back = from_text(to_text(answer).encode())
    assert back == answer
    for field in fields(answer):  # a list equals no tuple, but says so only where there is one
        assert type(getattr(back, field.name)) is type(getattr(answer, field.name))


@given(st.binary(max_size=200) | answers.map(lambda answer: to_text(answer).encode()[:-1]))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_what_is_no_answer_is_a_value_error(text):
    with pytest.raises(ValueError, match="no answer of a probe"):
        from_text(text)


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b"{}", b"3", b'{"Popen": {}}', b'{"Nvrtc": []}', b'{"Nvrtc": {"a": 1}}'],
)
def test_no_other_type_is_made(text):
    with pytest.raises(ValueError, match="no answer of a probe"):
        from_text(text)
