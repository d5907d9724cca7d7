"""One rank of the op benchmark: build the variants, check each, time them in interleaved rounds."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist

from benchmarks import cases, switches
from benchmarks.cases import Case
from benchmarks.limits import LIMITS
from benchmarks.ours import OURS, Floor, floors
from benchmarks.ranks import Link
from benchmarks.rivals import RIVALS
from benchmarks.schema import Row
from benchmarks.timing import Sample, capture, measure, slowest, summarize
from benchmarks.variant import Absent, Buffer, Variant, tolerance
from benchmarks.workbench import Place, Workbench
from sglang_tokenweave.agreement import gather

VARIANTS: Mapping[str, Callable[[Workbench, str], Variant]] = {**RIVALS, **OURS, **LIMITS}

_BUILD_S = 900.0  # flashinfer compiled its kernels in 300 s, on two cores

Timer = Callable[[Callable[[int], object], int, AbstractContextManager[object]], Sample]


@dataclass(frozen=True)
class Options:
    """What all ranks do."""

    cases: tuple[Case, ...]
    variants: tuple[str, ...]
    rounds: int
    ranks_per_gpu: int
    cache_bytes: int
    end: float  # of the run, on the machine's monotonic clock


@dataclass(frozen=True)
class Report:
    """What rank 0 tells after each size."""

    rows: tuple[Row, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)


def run_rank(rank: int, link: Link, options: Options) -> None:
    """Measure all cases on this rank's GPU; rank 0 reports them one by one."""
    link.phase("starting CUDA")
    device = torch.device("cuda", rank // options.ranks_per_gpu)
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)  # makes the context that the driver's calls need
    place = Place(rank, dist.get_world_size(), device, options.ranks_per_gpu)
    link.phase("mapping memory for the link's floor")
    copies = floors(place)
    run_cases(place, link, options, copies)
    for _, floor in copies:
        floor.close()


def run_cases(
    place: Place,
    link: Link,
    options: Options,
    copies: Sequence[tuple[str, Floor]],
    timer: Timer = capture,
) -> None:
    """Measure all cases, shape by shape."""
    for shape, group in groupby(options.cases, key=lambda case: case.shape):
        of_shape = list(group)
        bench = _bench(place, of_shape, options.cache_bytes)
        began = time.monotonic()
        variants, absent = _make(bench, options.variants, link, shape)
        # What a rival compiles when first used, for minutes, is not the time that was given.
        options = replace(options, end=options.end + time.monotonic() - began)
        _report(link, place, Report(absent=absent))
        able = variants
        for case in of_shape:
            if place.left(options.end) <= 0:
                name = f"{shape}, {case.tokens} tokens"
                _report(link, place, Report(absent={name: "the time was up"}))
                continue
            able, absent = _able(able, case)
            _report(link, place, Report(absent=absent))
            _report(link, place, Size(bench, case, options, link, timer).run(able, copies))
        link.phase(f"closing what {shape} used")
        for variant in variants:
            variant.close()
        bench.close()


def _bench(place: Place, of_shape: Sequence[Case], cache_bytes: int) -> Workbench:
    capacity = max(case.tokens * cases.num_buffers(case, cache_bytes) for case in of_shape)
    first = of_shape[0]
    dtype = getattr(torch, cases.DTYPES[first.dtype])
    return Workbench(place, first.hidden, dtype, max(case.tokens for case in of_shape), capacity)


def _make(
    bench: Workbench, names: Sequence[str], link: Link, shape: str
) -> tuple[list[Variant], dict[str, str]]:
    """Build the variants that can run here, and the reasons of those that cannot."""
    variants, absent = [], {}
    for name in names:
        link.phase(f"building {name} for {shape}", _BUILD_S)
        try:
            variants.append(bench.place.agree(partial(_build, bench, name)))
        except Absent as reason:
            absent[f"{name} at {shape}"] = str(reason)
    return variants, absent


def _build(bench: Workbench, name: str) -> Variant:
    factory = VARIANTS[name]
    switches.check(name, getattr(factory, "uses_multicast", False), os.environ)
    return factory(bench, name)


def _able(variants: Sequence[Variant], case: Case) -> tuple[list[Variant], dict[str, str]]:
    """Drop the variants that do not do this size, nor, as sizes ascend, those after it."""
    refusals = {variant.name: variant.refuses(case) for variant in variants}
    absent = {
        f"{name} at {case.shape} from {case.tokens} tokens": reason
        for name, reason in refusals.items()
        if reason is not None
    }
    return [variant for variant in variants if refusals[variant.name] is None], absent


def _report(link: Link, place: Place, report: Report) -> None:
    if place.rank == 0 and (report.rows or report.absent):
        link.send(report)


class Size:
    """All variants at one size."""

    def __init__(
        self,
        bench: Workbench,
        case: Case,
        options: Options,
        link: Link,
        timer: Timer,
    ) -> None:
        self._bench = bench
        self._place = bench.place
        self._case = case
        self._options = options
        self._link = link
        self._timer = timer
        self._count = cases.num_buffers(case, options.cache_bytes)
        self._calls = cases.num_calls(
            case, self._place.world_size, self._count, smoke=self._place.smoke
        )
        self._buffers: dict[str, tuple[Variant, list[Buffer]]] = {}
        self._errors: dict[str, float] = {}
        self._absent: dict[str, str] = {}

    def run(self, variants: Sequence[Variant], copies: Sequence[tuple[str, Floor]]) -> Report:
        """Check, capture and time them; what fails is left out with its reason."""
        samples: dict[str, Sample] = {}
        for variant in variants:
            try:
                samples[variant.name] = self._prepare(variant)
            except Absent as reason:
                self._leave_out(variant.name, str(reason))
        for name, floor in copies:
            samples[name] = self._timer(floor.run, cases.FLOOR_CALLS, nullcontext())
        self._phase("timing")
        times = measure(samples, self._options.rounds, self._before, self._in_time)
        for name, (variant, _) in list(self._buffers.items()):
            try:
                self._check(variant, seed=(self._case.tokens, -1))
            except Absent as reason:
                self._leave_out(name, f"{reason}, after it was timed")
                del times[name]
        return Report(self._rows(times, dict(copies)), self._absent)

    def _prepare(self, variant: Variant) -> Sample:
        case = self._case
        self._phase(f"checking {variant.name}")
        buffers = self._place.agree(lambda: variant.buffers(case, self._count))
        self._buffers[variant.name] = variant, buffers
        self._check(variant, seed=(case.tokens, 0))
        self._phase(f"capturing {variant.name}")

        def call(index: int) -> None:
            variant.run(buffers[index % self._count])

        return self._place.agree(lambda: self._timer(call, self._calls, variant.capturing()))

    def _check(self, variant: Variant, seed: tuple[int, int]) -> None:
        """Run once on fresh inputs and compare with float64."""
        if not variant.computes:
            return
        inputs, buffer = self._bench.inputs, self._buffers[variant.name][1][-1]

        def error() -> float:
            inputs.fill(buffer, seed, self._place.rank)
            self._place.meet()
            output = variant.run(buffer)
            self._place.synchronize()
            return inputs.error(variant, buffer, output, seed)

        errors = gather(self._place.agree(error), self._place.group)
        allowed = tolerance(self._bench.dtype, variant.roundings)
        if not all(each <= allowed for each in errors):  # NaN is not
            raise Absent(f"wrong result: relative error {errors} by rank, {allowed:.1e} is allowed")
        self._errors[variant.name] = max(*errors, self._errors.get(variant.name, 0.0))

    def _before(self, name: str, round_index: int) -> None:
        if name in self._buffers:
            for index, buffer in enumerate(self._buffers[name][1]):
                seed = (self._case.tokens, 1 + round_index * self._count + index)
                self._bench.inputs.fill(buffer, seed, self._place.rank)
        self._place.meet()

    def _in_time(self) -> bool:
        return self._place.left(self._options.end) > 0

    def _rows(
        self, times: Mapping[str, list[float]], copies: Mapping[str, Floor]
    ) -> tuple[Row, ...]:
        by_rank = gather(dict(times), self._place.group)
        summaries = {
            name: summarize(slowest([of_rank[name] for of_rank in by_rank])) for name in times
        }
        rates = {
            name: floor.bytes / summaries[name].time_us / 1e3 for name, floor in copies.items()
        }
        best = max(rates, key=lambda name: rates[name])
        floor_us = cases.floor_us(self._case, self._place.world_size, rates[best])
        spread = summaries[best].spread_us / summaries[best].time_us * floor_us
        rows = [self._row("floor", floor_us, spread, {"rate_gb_s": rates[best]})]
        for name in self._buffers:
            if name in times:
                summary = summaries[name]
                extra = {"relative_error": self._errors[name]} if name in self._errors else {}
                rows.append(self._row(name, summary.time_us, summary.spread_us, extra))
        return tuple(rows)

    def _row(self, name: str, time_us: float, spread_us: float, extra: Mapping[str, float]) -> Row:
        return Row(self._case.shape, self._case.tokens, name, time_us, spread_us, extra)

    def _leave_out(self, name: str, reason: str) -> None:
        self._buffers.pop(name, None)
        self._absent[f"{name} at {self._case.shape}, {self._case.tokens} tokens"] = reason

    def _phase(self, what: str) -> None:
        self._link.phase(f"{what}, {self._case.shape}, {self._case.tokens} tokens")
