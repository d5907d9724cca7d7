"""Which table a server plans with: a given one, the kept one, or one that is measured now."""

import hashlib
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_tokenweave import dummy, seams, user_cache
from sglang_tokenweave.agreement import Group, compare
from sglang_tokenweave.config import TokenWeaveConfig
from sglang_tokenweave.plan import MOST_TWO_SHOT_TOKENS, Kind, Mode
from sglang_tokenweave.runtime import Runtime
from sglang_tokenweave.tuning import cache, text
from sglang_tokenweave.tuning.measure import Meter, NotMeasurableError
from sglang_tokenweave.tuning.nodes import TableError
from sglang_tokenweave.tuning.search import search
from sglang_tokenweave.tuning.space import Space, bucket_sizes
from sglang_tokenweave.tuning.table import OFF, Bucket, Candidate, Key, Table

logger = logging.getLogger(__name__)
SMALLEST_PREFILL = 64  # tokens; below, stock has the better kernels for everything
# Requests. Reading the weights takes as long as computing with some 200 rows, so each of two halves
# with fewer would take as long as the whole.
_SMALLEST_CAPTURED = 256
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Tuned:
    """A table in use, and where it comes from."""

    table: Table
    source: str  # "file", "cache" or "measured"
    path: str  # empty: it could not be kept
    seconds: float  # that it took to get it

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for reports."""
        return {
            "source": self.source,
            "path": self.path,
            "seconds": round(self.seconds, 3),
            "measured_at": self.table.measured_at,
            "age_s": _age_s(self.table.measured_at),
            "sizes": len(self.table.buckets),
            "edited": sum(bucket.is_edited for bucket in self.table.buckets),
        }

    def summary(self) -> str:
        """Return it as one line of a log."""
        facts = self.as_dict()
        edited = f", {facts['edited']} choices made by hand" if facts["edited"] else ""
        return (
            f"tuned table ({self.source}, {facts['sizes']} sizes, measured {facts['measured_at']}"
            f"{edited}) {self.path or 'not kept'}"
        )


def find(config: TokenWeaveConfig, key: Key, group: Group) -> Tuned | None:
    """Return the given table, else the kept one; None: there is none. A collective call.

    Every rank reads a given file, which may be one on each host, and they compare what they read.
    Of kept tables rank 0's counts, and all others get its text.

    Raises:
        TableError: the given file is no table, or of another key; on all ranks.
        DisagreementError: the ranks read different files.
        LostRankError: some rank did not take part.
    """
    began = time.perf_counter()
    if config.table and config.tune != "force":
        read = _read_given(Path(config.table), group)
        differences = read.key.differences(key)
        if differences:
            raise TableError(f"table {config.table} is of another key: {differences}")
        return Tuned(read, "file", config.table, time.perf_counter() - began)
    if config.tune != "auto":
        return None
    kept = group.gather(cache.load(key) if group.rank == 0 else None)[0]
    if kept is None:
        return None
    return Tuned(text.from_text(kept), "cache", _path(key), time.perf_counter() - began)


def measure(
    config: TokenWeaveConfig, key: Key, group: Group, model_runner: Any, runtime: Runtime
) -> Tuned:
    """Measure a table, say so, and keep it; a collective call.

    The ranks cannot differ: each sees the slowest rank's times and clock, and decides by nothing
    else. In the end they compare what they found.

    Raises:
        NotMeasurableError: a candidate did not run as planned, or there was no time for any size;
            on all ranks.
        DisagreementError: the ranks found different tables.
        LostRankError: some rank did not take part.
    """
    meter = Meter(model_runner, runtime, group)
    sizes = _sizes(model_runner, runtime)
    buckets: list[Bucket] = []
    tried = space(
        config,
        key,
        has_copy_engines=runtime.transport.has_copy_engines,
        has_one_shot=runtime.transport.has_one_shot,
        has_two_shot=runtime.transport.has_two_shot,
        smallest_woven_decode=_smallest_woven_decode(model_runner, runtime),
    )
    found = search(sizes, tried, meter.measure, meter.spent_s, config.tune_seconds)
    with seams.few_collections():
        for bucket in found:
            buckets.append(bucket)
            if group.rank == 0:
                logger.info(
                    "TokenWeave tunes, %d of %d sizes in %.1f s: %s",
                    len(buckets),
                    len(sizes),
                    meter.spent_s(),
                    _describe(bucket),
                )
    if not buckets:  # the same on all ranks
        raise NotMeasurableError("no size ran five times: give more --tokenweave-tune-seconds")
    now = group.gather(datetime.now(UTC).strftime(_TIME_FORMAT))[0]
    table = Table(key, now, tuple(buckets))
    compare("the measured table", _digest(text.to_text(table)), group)
    path = _keep(config, table) if group.rank == 0 else ""
    tuned = Tuned(table, "measured", group.gather(path)[0], meter.spent_s())
    if group.rank == 0:
        logger.info("TokenWeave tuned in %.1f s: %s", tuned.seconds, tuned.summary())
    return tuned


def space(
    config: TokenWeaveConfig,
    key: Key,
    *,
    has_copy_engines: bool,
    has_one_shot: bool,
    has_two_shot: bool,
    smallest_woven_decode: int,
) -> Space:
    """Return what may be tried: several numbers of CTAs only where the op occupies them."""
    ctas, fuse_ctas = [config.ctas], [config.fuse_ctas]
    if key.transport != "reference":
        ctas += [*([0] if has_copy_engines else []), 8, 16, 4]
        fuse_ctas += [16, 32, 8]
    return Space(
        key.sms,
        tuple(dict.fromkeys(ctas)),
        tuple(dict.fromkeys(fuse_ctas)),
        smallest_woven_decode,
        has_one_shot,
        MOST_TWO_SHOT_TOKENS if has_two_shot else 0,
    )


def _smallest_woven_decode(model_runner: Any, runtime: Runtime) -> int:
    largest_graph = max(seams.decode_graph_sizes(model_runner), default=0)
    if largest_graph and runtime.cuts_captured_decodes:
        return _SMALLEST_CAPTURED
    return max(2, largest_graph + 1)  # launches one by one cannot beat a graph


def _read_given(path: Path, group: Group) -> Table:
    try:
        table, content = text.read_file(path)
    except TableError as error:
        compare(f"the table {path}", str(error), group)
        raise
    compare(f"the table {path}", _digest(content), group)
    return table


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _sizes(model_runner: Any, runtime: Runtime) -> list[tuple[Mode, int]]:
    """Return what can be a batch here: as much as the buffer and SGLang's memory hold.

    Decodes without a graph, where SGLang has some, are not worth the time: few batches are as
    large, and launching them one by one takes longer than what they compute.
    """
    most = min(runtime.buffer.capacity, int(model_runner.max_total_num_tokens))
    requests = min(most, int(model_runner.req_to_token_pool.size))
    requests = min(requests, max(seams.decode_graph_sizes(model_runner), default=requests))
    prefills = [(Mode.PREFILL, tokens) for tokens in bucket_sizes(most, SMALLEST_PREFILL)]
    decodes = [(Mode.DECODE, tokens) for tokens in bucket_sizes(requests, 1)]
    return [size for size in [*prefills, *decodes] if dummy.fits(model_runner, *size)]


def _describe(bucket: Bucket) -> str:
    off = bucket.time_of(OFF)
    if bucket.chosen == OFF:
        return f"{bucket.mode} {bucket.tokens} tokens: off, {off.us:.0f} us"
    us = bucket.time_of(bucket.chosen).us
    return (
        f"{bucket.mode} {bucket.tokens} tokens: {shown(bucket.chosen)}, {us:.0f} us, "
        f"off {off.us:.0f} us"
    )


def shown(candidate: Candidate) -> str:
    """Return a candidate that does something, in a few words."""
    words = ["one-shot" if candidate.is_one_shot else f"{candidate.fuse_ctas} CTAs alone"]
    if candidate.kind is Kind.WEAVE:
        beside = "copy engines" if candidate.needs_copy_engines else f"{candidate.ctas} CTAs"
        words = [f"{beside} beside", *words]
        words += [f"cut {candidate.cut_offset:+d}"] if candidate.cut_offset else []
    return f"{candidate.kind} ({', '.join(words)})"


def _keep(config: TokenWeaveConfig, table: Table) -> str:
    if not config.table or config.tune != "force":  # a file that was only given stays as it is
        path = cache.store(table)
        return str(path) if path else ""
    try:
        user_cache.write(Path(config.table), text.to_text(table).encode())
    except OSError as error:
        logger.warning("TokenWeave does not keep the table that it measured: %s", error)
        return ""
    return config.table


def _path(key: Key) -> str:
    try:
        return str(cache.path_of(key))
    except RuntimeError:  # no home folder here; rank 0 has one
        return ""


def _age_s(measured_at: str) -> float | None:
    try:
        then = datetime.strptime(measured_at, _TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError:  # a person wrote something else
        return None
    return round((datetime.now(UTC) - then).total_seconds(), 1)
