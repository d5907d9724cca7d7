"""The differential soak, shortened, and that it sees what it is to see."""

import asyncio
from dataclasses import replace
from pathlib import Path

import differential
import load
import pytest
import seeded
from differential import MIX, Findings, Run, Servers
from load import Request, Sample

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with differential.serve(tmp_path_factory.mktemp("differential")) as running:
        yield running


@pytest.fixture(scope="module")
def pairs(servers: Servers):
    """Return requests with log probabilities, each with both servers' answers."""
    drawn = (load.draw(MIX, number) for number in range(10_000, 10_400))
    requests = [
        differential.revealing(request)
        for request in drawn
        if not request.is_chat and request.leave_after is None and request.num_new_tokens > 4
    ][:16]
    both = [
        asyncio.run(differential.answers(each, requests)) for each in (servers.stock, servers.woven)
    ]
    return list(zip(requests, *both, strict=True))


def test_answers_are_equal(servers: Servers, tmp_path: Path) -> None:
    runs: list[Run] = []
    run = differential.compare_all(servers, range(300), range(0), runs.append)
    assert run.woven.different["all"] == 0, run.woven.texts
    # A tie is rare: one in some thousand tokens.
    assert run.woven.equal["all"] >= 295, run.woven.texts
    for kind in ("sampled with a seed", "chat", "n > 1", "log probabilities"):
        assert run.woven.equal[kind] > 10
    assert run.woven.equal["connection closed by the client"] > 0
    assert run.woven.equal["aborted by its id"] > 0
    assert run.woven.equal["longer than a chunk of 512"] > 0
    batches = run.state["batches"]
    assert batches["prefill"]["weave"] > batches["prefill"]["off"]
    assert batches["decode"]["weave"] > 0
    assert run.state["cuts"]["inside"] > 0
    assert not run.state["fallbacks"]

    assert len(runs) == 2  # a block of 250 and the rest
    differential.write(tmp_path / "out.json", "a command", run)
    assert '"different"' in (tmp_path / "out.json").read_text()


def test_sees_two_answers_that_were_swapped(servers: Servers, pairs) -> None:
    for (request, stock, _), (_, _, other) in zip(pairs, [*pairs[1:], pairs[0]], strict=True):
        one, swapped = stock[:1], other[:1]
        found = differential.compare(replace_n(request), one, swapped)
        assert found, "another request's answer passed"
        findings = Findings()
        both = (servers.stock, servers.woven)
        text = differential._judge(findings, replace_n(request), [one, swapped], both)
        assert findings.different["all"] == 1, text
        assert "DIFFERENT" in text


def replace_n(request: Request) -> Request:
    """Return the request for one sample."""
    sampling = {**request.sampling, "n": 1}
    return replace(request, payload={**request.payload, "sampling_params": sampling})


def test_the_model_of_the_sampler_names_the_tokens_that_servers_chose(pairs) -> None:
    num_sampled = num_unlikely = 0
    for request, *both in pairs:
        for sample in (sample for samples in both for sample in samples):
            for at, token in enumerate(sample.tokens):
                position = sample.prompt_tokens + at - 1
                assert seeded.choices(sample.top[at], request.sampling, position) == {token}
                num_sampled += request.sampling["temperature"] > 0
                num_unlikely += token != sample.top[at][0][1]
    assert num_sampled > 20
    assert num_unlikely > 10, "the best tokens prove little"


BEST = [(-1.0, 7), (-1.00001, 8), (-3.0, 9)]
GREEDY = {"temperature": 0}


def test_only_near_ties_are_open() -> None:
    assert seeded.choices(BEST, GREEDY, 0) == {7}
    assert seeded.choices(BEST, GREEDY, 0, error=1e-4) == {7, 8}
    assert seeded.choices([BEST[0], BEST[2]], GREEDY, 0, error=1e-4) == {7}


REQUEST = Request(
    "/generate", {"input_ids": [5], "sampling_params": {"max_new_tokens": 2, **GREEDY}}
)
SAMPLE = Sample([7, 7], "ab", [-1.0, -2.0], [BEST, BEST], "length", 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": [7, 8]},
        {"tokens": [7]},
        {"text": "ac"},
        {"logprobs": [-1.0, -2.001]},
        {"logprobs": [-1.0]},
        {"top": [BEST, [(-1.0, 7), (-1.1, 8)]]},
        {"finish": "abort"},
    ],
)
def test_every_part_of_an_answer_counts(changes) -> None:
    assert not differential.compare(REQUEST, [SAMPLE], [SAMPLE])
    assert differential.compare(REQUEST, [SAMPLE], [replace(SAMPLE, **changes)])


@pytest.mark.parametrize(("tokens", "is_equal"), [([], True), ([7], True), ([8], False)])
def test_what_came_of_an_aborted_request_begins_the_whole_answer(tokens, is_equal) -> None:
    aborted = replace(REQUEST, leave_after=1)
    part = Sample(tokens, "", finish="abort")
    assert (not differential.compare(aborted, [SAMPLE], [part])) == is_equal
    assert (not differential.compare(aborted, [part], [SAMPLE])) == is_equal


def test_a_tie_explains_no_other_tokens() -> None:
    again = [[SAMPLE]]
    for token, is_tie in ((8, True), (9, False)):
        [found] = differential.compare(REQUEST, [SAMPLE], [replace(SAMPLE, tokens=[7, token])])
        assert differential.explain(REQUEST, found, again) == is_tie
