"""Random requests, the same ones for the same seed, and a client that sends them to a server."""

import asyncio
import json
import math
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

REQUEST_DEADLINE_S = 120
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "seven")


class WrongAnswer(AssertionError):
    """A server answered a request, and not as it was asked."""


@dataclass(frozen=True)
class Mix:
    """From what requests are drawn."""

    seed: int = 0
    longest: int = 2000
    longest_usual: int = 2000  # nine of ten prompts are at most so long
    most_new_tokens: int = 16
    num_prefixes: int = 0  # that half of the prompts start with
    # Sampled requests bring a seed, and a `top_k` for which see seeded.py.
    is_seeded: bool = False


@dataclass(frozen=True)
class Request:
    """One request.

    After `leave_after` pieces of its stream the client has it aborted by its `rid`, if the payload
    has one, and closes the connection otherwise.
    """

    path: str
    payload: dict[str, Any]
    leave_after: int | None = None

    @property
    def is_streamed(self) -> bool:
        return bool(self.payload.get("stream"))

    @property
    def is_chat(self) -> bool:
        return self.path.startswith("/v1/")

    @property
    def num_samples(self) -> int:
        return self.sampling.get("n", 1)

    @property
    def num_new_tokens(self) -> int:
        return self.sampling["max_tokens" if self.is_chat else "max_new_tokens"]

    @property
    def sampling(self) -> dict[str, Any]:
        return self.payload if self.is_chat else self.payload["sampling_params"]

    @property
    def has_logprobs(self) -> bool:
        return "logprobs" in self.payload or "return_logprob" in self.payload


@dataclass
class Sample:
    """One of the answers to a request, as far as it came."""

    tokens: list[int] = field(default_factory=list)  # none from the chat API
    text: str = ""
    logprobs: list[float] = field(default_factory=list)  # the prompt's, then those of `tokens`
    # By token: (log probability, token) of the best, sorted; the chat API does not tell the token.
    top: list[list[tuple[float, int | None]]] = field(default_factory=list)
    finish: str | None = None
    prompt_tokens: int = 0


def draw(mix: Mix, index: int) -> Request:
    """Return the request of this number."""
    rng = random.Random(f"{mix.seed}:{index}")
    if rng.random() < 0.1:
        return _draw_chat(mix, rng)
    sampling = {
        "max_new_tokens": rng.randint(1, mix.most_new_tokens),
        "ignore_eos": True,
        "n": rng.choice((2, 3)) if rng.random() < 0.1 else 1,
        **_draw_sampling(mix, rng, "sampling_seed"),
    }
    payload: dict[str, Any] = {"input_ids": _draw_prompt(mix, rng), "sampling_params": sampling}
    if rng.random() < 0.4:
        payload |= {"return_logprob": True, "top_logprobs_num": 2}
        payload |= {"logprob_start_len": 0} if rng.random() < 0.25 else {}
    leave_after = None
    if rng.random() < 0.4:
        payload["stream"] = True
        if rng.random() < 0.25:
            leave_after = rng.randint(0, 4)
            sampling |= {"max_new_tokens": 4 * mix.most_new_tokens, "n": 1}
            if leave_after and rng.random() < 0.5:
                payload["rid"] = f"{mix.seed}-{index}"
    return Request("/generate", payload, leave_after)


def _draw_chat(mix: Mix, rng: random.Random) -> Request:
    content = " ".join(rng.choices(_WORDS, k=_draw_length(mix, rng) // 4 + 1))
    payload = {
        "model": "default",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": rng.randint(1, mix.most_new_tokens),
        "ignore_eos": True,
        **_draw_sampling(mix, rng, "seed"),
    }
    if rng.random() < 0.5:
        payload |= {"stream": True, "stream_options": {"include_usage": True}}
    elif rng.random() < 0.5:
        payload |= {"logprobs": True, "top_logprobs": 2}
    return Request("/v1/chat/completions", payload)


def _draw_sampling(mix: Mix, rng: random.Random, seed: str) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"temperature": 0}
    options: dict[str, Any] = {"temperature": round(rng.uniform(0.3, 1.5), 2)}
    if not mix.is_seeded:
        kinds = ({}, {"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": 50})
        return options | rng.choice(kinds)
    kinds = ({"top_k": 5}, {"top_k": 15}, {"top_p": 0.8, "top_k": 15})
    return options | rng.choice(kinds) | {seed: rng.randrange(2**31)}


def _draw_prompt(mix: Mix, rng: random.Random) -> list[int]:
    length = _draw_length(mix, rng)
    prefix: list[int] = []
    if mix.num_prefixes and rng.random() < 0.5:
        of_all = random.Random(f"{mix.seed}:prefix {rng.randrange(mix.num_prefixes)}")
        prefix = _tokens(of_all, _log_uniform(of_all, 8, mix.longest // 4))
    return [*prefix[: length - 1], *_tokens(rng, max(1, length - len(prefix)))]


def _draw_length(mix: Mix, rng: random.Random) -> int:
    return _log_uniform(rng, 1, mix.longest_usual if rng.random() < 0.9 else mix.longest)


def _log_uniform(rng: random.Random, least: int, most: int) -> int:
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 1000) for _ in range(count)]  # 0 to 2 are special


def open_session(url: str) -> aiohttp.ClientSession:
    """Return a session whose requests end, with an error if need be."""
    return aiohttp.ClientSession(
        url,
        timeout=aiohttp.ClientTimeout(total=REQUEST_DEADLINE_S),
        # A new connection each: one that is kept can be closed by the server, whose limit is 5 s,
        # just when the next request is on its way.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        trust_env=False,  # loopback never goes through a proxy
    )


async def ask(session: aiohttp.ClientSession, request: Request) -> list[Sample]:
    """Send a request and return its answers; of one that leaves, what came until then.

    Raises:
        WrongAnswer: the answer has another status, number of tokens or end than asked for.
        aiohttp.ClientError, asyncio.TimeoutError: there was none.
    """
    samples = [Sample() for _ in range(request.num_samples)]
    if request.leave_after == 0:
        await _send_and_leave(session, request)
        return samples
    async with session.post(request.path, json=request.payload) as response:
        if response.status != 200:
            raise WrongAnswer(f"status {response.status}: {(await response.text())[:500]}")
        if not request.is_streamed:
            _read_whole(request, await response.json(), samples)
        else:
            num_pieces = 0
            async for piece in _pieces(response):
                _read_piece(request, piece, samples)
                num_pieces += 1
                if num_pieces == request.leave_after:
                    if "rid" not in request.payload:
                        response.close()  # the connection, with the stream still running
                        return samples
                    await _abort(session, request)
    _check(request, samples)
    return samples


async def _send_and_leave(session: aiohttp.ClientSession, request: Request) -> None:
    """Close the connection before anything was answered."""
    asked = asyncio.ensure_future(session.post(request.path, json=request.payload))
    await asyncio.wait([asked], timeout=0.02)
    if asked.done() and not asked.cancelled():
        (await asked).close()
    asked.cancel()


async def _abort(session: aiohttp.ClientSession, request: Request) -> None:
    async with session.post("/abort_request", json={"rid": request.payload["rid"]}) as response:
        response.raise_for_status()


async def _pieces(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    # Not by lines of the stream: a piece with many log probabilities is longer than its limit.
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            text = line.removeprefix(b"data: ").strip()
            if text and text != b"[DONE]":
                yield json.loads(text)
    if rest.strip():
        raise WrongAnswer(f"a stream ended inside a line: {rest[-100:]!r}")


def _read_whole(request: Request, raw: Any, samples: list[Sample]) -> None:
    if request.is_chat:
        for choice in raw["choices"]:
            sample = samples[choice["index"]]
            sample.text, sample.finish = choice["message"]["content"], choice["finish_reason"]
            sample.prompt_tokens = raw["usage"]["prompt_tokens"]
            told = (choice["logprobs"] or {}).get("content") or ()
            sample.logprobs = [token["logprob"] for token in told]
            sample.top = [
                [(best["logprob"], None) for best in token["top_logprobs"]] for token in told
            ]
        _check_usage(request, raw["usage"])
        return
    for sample, one in zip(samples, raw if isinstance(raw, list) else [raw], strict=True):
        _read_generated(one, sample)


def _read_piece(request: Request, piece: dict[str, Any], samples: list[Sample]) -> None:
    if "error" in piece:
        raise WrongAnswer(f"an error in a stream: {piece}")
    if not request.is_chat:
        _read_generated(piece, samples[piece.get("index", 0)])
        return
    for choice in piece["choices"]:
        sample = samples[choice["index"]]
        sample.text += choice["delta"].get("content") or ""
        sample.finish = choice["finish_reason"] or sample.finish
    if piece.get("usage"):
        _check_usage(request, piece["usage"])


def _read_generated(raw: dict[str, Any], sample: Sample) -> None:
    """Every piece of /generate tells all of the answer so far, but the prompt's only once."""
    info = raw["meta_info"]
    sample.tokens, sample.text = raw["output_ids"], raw["text"]
    sample.finish = (info["finish_reason"] or {}).get("type")
    sample.prompt_tokens = info["prompt_tokens"]
    prompt = info.get("input_token_logprobs") or ()
    sample.logprobs = [
        logprob
        for logprob, *_ in (*prompt, *info.get("output_token_logprobs", ()))
        if logprob is not None
    ]
    best = info.get("output_top_logprobs", ())
    sample.top = [[(logprob, token) for logprob, token, *_ in entries] for entries in best]


def _check(request: Request, samples: list[Sample]) -> None:
    for sample in samples:
        if request.leave_after is not None and sample.finish == "abort":
            continue
        if sample.finish != "length":
            raise WrongAnswer(f"ended by {sample.finish!r} instead of its length")
        if not request.is_chat and len(sample.tokens) != request.num_new_tokens:
            raise WrongAnswer(f"{len(sample.tokens)} tokens of {request.num_new_tokens}")
        if request.has_logprobs and len(sample.logprobs) < request.num_new_tokens:
            raise WrongAnswer(f"{len(sample.logprobs)} log probabilities")


def _check_usage(request: Request, usage: dict[str, int]) -> None:
    if usage["completion_tokens"] != request.num_new_tokens:
        raise WrongAnswer(f"{usage['completion_tokens']} tokens of {request.num_new_tokens}")
