"""Publish what ran how: the log, /server_info and Prometheus."""

import importlib.metadata
import logging
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

from sglang_tokenweave import __version__
from sglang_tokenweave.install import State, state
from sglang_tokenweave.plan import Kind, Mode
from sglang_tokenweave.runtime import Runtime
from sglang_tokenweave.stats import Stats

logger = logging.getLogger(__name__)


def server_info(current: State) -> dict[str, Any]:
    """Return the `tokenweave` block of /server_info: plain values only."""
    stats = current.runtime.stats if current.runtime else Stats()
    return {
        "active": current.is_active,
        "reasons": list(current.reasons),
        "notes": list(current.notes),
        "version": __version__,
        "sglang": importlib.metadata.version("sglang"),
        "model": current.model,
        "tp_size": current.tp_size,
        "pp_size": current.pp_size,
        "transport": current.runtime.transport.name if current.runtime else "",
        "config": current.config.as_dict(),
        "tuned": current.tuned.as_dict() if current.tuned else None,
        **stats.as_dict(),
    }


def after_get_internal_state(result: Any, scheduler: Any, recv_req: Any) -> Any:
    """Add our block to /server_info (AFTER hook on `Scheduler.get_internal_state`)."""
    result.internal_state["tokenweave"] = server_info(state)
    return result


def after_run_batch(result: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Account for a batch and publish (AFTER hook on `Scheduler.run_batch`)."""
    if state.runtime is None or not state.is_active:
        return
    stats = state.runtime.stats
    if stats.num_batches == _reporter.num_batches:  # it ran by SGLang's own loop or graph
        _count_stock(state.runtime, batch, in_graph=getattr(result, "can_run_cuda_graph", False))
    _reporter.num_batches = stats.num_batches
    if state.rank == 0:
        _reporter.publish(stats, getattr(scheduler, "metrics_collector", None))
        _reporter.log(stats, state.config.log_interval)


def _count_stock(runtime: Runtime, batch: Any, *, in_graph: bool) -> None:
    if batch.forward_mode.is_decode():
        mode, num_tokens = Mode.DECODE, len(batch.reqs)
    elif batch.forward_mode.is_extend():
        mode, num_tokens = Mode.PREFILL, sum(batch.extend_lens)
    else:
        return
    kind = runtime.kind_in_graph(mode, num_tokens) if in_graph else Kind.OFF
    runtime.stats.count(mode, kind, num_tokens)


class _Reporter:
    """What was published last: Prometheus counters take increments, the log every Nth batch."""

    def __init__(self) -> None:
        self.num_batches = 0
        self._logged = 0
        self._published: dict[str, Counter[Any]] = {}
        self._metrics: dict[str, Any] = {}

    def publish(self, stats: Stats, collector: Any) -> None:
        """Bring SGLang's /metrics up to date; `collector` is SGLang's, None without metrics."""
        if collector is None:
            return
        if not self._metrics:
            self._metrics = _create_metrics(collector.labels)
        for name, metric in self._metrics.items():
            current: Counter[Any] = getattr(stats, name)
            before = self._published.setdefault(name, Counter())
            for key in [key for key in current if current[key] != before[key]]:
                metric.labels(*collector.labels.values(), *_values(key)).inc(
                    current[key] - before[key]
                )
            self._published[name] = Counter(current)

    def log(self, stats: Stats, interval: int) -> None:
        """Write one line for every `interval` batches."""
        if not interval or stats.num_batches - self._logged < interval:
            return
        self._logged = stats.num_batches
        logger.info("TokenWeave after %d batches: %s", stats.num_batches, _summary(stats))


_reporter = _Reporter()


def _create_metrics(labels: Mapping[str, Any]) -> dict[str, Any]:
    # Not before now: it must find the multi-process folder that SGLang names in the environment.
    from prometheus_client import Counter as Metric

    def metric(name: str, text: str, *own: str) -> Any:
        return Metric(f"sglang:tokenweave_{name}", text, labelnames=[*labels, *own])

    return {
        "batches": metric("batches", "Batches by mode and plan.", "mode", "plan"),
        "tokens": metric("tokens", "Tokens by mode and plan.", "mode", "plan"),
        "cuts": metric("cuts", "Woven batches by where the cut fell.", "position"),
        "fallbacks": metric("fallbacks", "Batches that ran stock though planned.", "reason"),
        "drops": metric("drops", "Plans that lost on the live load.", "mode", "tokens"),
    }


def _values(key: Hashable) -> tuple[str, ...]:
    return tuple(map(str, key)) if isinstance(key, tuple) else (str(key),)


def _summary(stats: Stats) -> str:
    plans = ", ".join(
        f"{mode} {plan} {count} ({stats.tokens[mode, plan]} tokens)"
        for (mode, plan), count in sorted(stats.batches.items())
    )
    return f"{plans}; cuts inside {stats.cuts['inside']}, between {stats.cuts['between']}" + (
        f"; fallbacks {dict(stats.fallbacks)}" if stats.fallbacks else ""
    )
