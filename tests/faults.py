"""Clients that are being answered while a fault strikes, and what becomes of their answers."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import workloads
from server import WEAVE, Server, after_import

FLAGS = ("--tokenweave-strict", *WEAVE)


@dataclass(frozen=True)
class Question:
    """A greedy request; the same on every server."""

    seed: int
    num_tokens: int
    streamed: bool = False

    def payload(self) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": self.num_tokens, "ignore_eos": True}
        return {"input_ids": workloads.token_ids(self.seed, 200), "sampling_params": sampling}


# Seconds of decoding, so that a fault meets them under way; they are woven together.
LONG = tuple(Question(seed, 100, streamed=seed % 2 == 0) for seed in range(4))
SHORT = Question(9, 8)  # asked again and again
Undisturbed = Mapping[Question, tuple[int, ...]]


@dataclass(frozen=True)
class Outcome:
    """What a client got: an answer that says it is whole, or an error and what came before it."""

    question: Question
    tokens: tuple[int, ...]
    error: str | None
    ended: float  # time.monotonic()


@dataclass
class Fault:
    """What a test saw of a fault; the fixture `fault` writes it into the report of the tests."""

    name: str
    where: str
    injected: int = 1
    seconds: float | None = None  # to a clear error, or from the fault's end to the next answer
    sees: str = ""
    leaks: int | None = None  # None: not looked for


def ask(server: Server, question: Question, on_piece: Callable[[], Any] | None = None) -> Outcome:
    """Ask, and take nothing for an answer that does not say that it is whole."""
    tokens: tuple[int, ...] = ()
    error: str | None = "an answer without an end"
    try:
        for piece in _pieces(server, question):
            if "error" in piece:
                error = f"error: {piece['error']['message']}"
                break
            tokens = tuple(piece["output_ids"])
            reason = piece["meta_info"]["finish_reason"]
            if reason is not None:
                error = f"aborted: {reason.get('message')}" if reason["type"] == "abort" else None
            if on_piece is not None:
                on_piece()
    except requests.HTTPError as problem:
        error = f"status {problem.response.status_code}"
    except requests.RequestException as problem:
        error = type(problem).__name__
    return Outcome(question, tokens, error, time.monotonic())


def _pieces(server: Server, question: Question) -> Iterator[dict[str, Any]]:
    if question.streamed:
        yield from server.stream(**question.payload())
        return
    response = server.request("/generate", **question.payload())
    response.raise_for_status()
    yield response.json()


class Clients:
    """Long answers under way, streamed and whole, and a client that asks short ones on and on."""

    def __init__(self, server: Server, pool: ThreadPoolExecutor) -> None:
        self._server = server
        self._is_over = threading.Event()
        begun = threading.Semaphore(0)
        self._long = [pool.submit(ask, server, question, begun.release) for question in LONG]
        self._short = pool.submit(self._ask_on_and_on)
        for _ in range(8):
            assert begun.acquire(timeout=60), "the streams do not begin"
        assert not any(future.done() for future in self._long)

    def long(self) -> list[Outcome]:
        """Return what became of the long answers."""
        return [future.result(120) for future in self._long]

    def short(self) -> list[Outcome]:
        """Stop asking, and return what became of the short answers."""
        self._is_over.set()
        return self._short.result(120)

    def _ask_on_and_on(self) -> list[Outcome]:
        outcomes = [ask(self._server, SHORT)]
        while not self._is_over.is_set() and outcomes[-1].error is None:
            outcomes.append(ask(self._server, SHORT))
        return outcomes


@contextmanager
def clients(server: Server) -> Iterator[Clients]:
    """Have questions answered while the body runs."""
    with ThreadPoolExecutor(len(LONG) + 1) as pool:
        yield Clients(server, pool)


def assert_honest(outcomes: Sequence[Outcome], undisturbed: Undisturbed) -> None:
    """What counts as an answer equals the undisturbed one; an error follows its beginning."""
    for outcome in outcomes:
        expected = undisturbed[outcome.question]
        if outcome.error is not None:
            expected = expected[: len(outcome.tokens)]
        assert outcome.tokens == expected, outcome


def errors(outcomes: Sequence[Outcome]) -> set[str]:
    return {outcome.error for outcome in outcomes if outcome.error is not None}


def obedient(folder: Path) -> Path:
    """Write a folder for `pythonpath` that makes every process of a server obey `order`."""
    code = Path(__file__).with_name("striking.py").read_text()
    return after_import(folder, "sglang_tokenweave.report", code)


def order(server: Server, action: str, where: str, rank: int) -> Path:
    """Order a rank to "raise", "stop" or "sleep SECONDS" when it next comes by; see striking.py."""
    path = server.folder / f"order-{where}-{rank}"
    path.with_suffix(".new").write_text(action)
    os.replace(path.with_suffix(".new"), path)
    return path


def descriptors(server: Server) -> dict[int, int]:
    """Return the number of open descriptors of each process of a server."""
    return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in server.processes()}


def said(server: Server, cause: str) -> str:
    """Return the words of the log that match the pattern `cause`, without process ids."""
    found = re.search(cause, server.log())
    assert found, server.error(f"does not say {cause}")
    return re.sub(r" \(pid=\d+\)", "", found[0])
