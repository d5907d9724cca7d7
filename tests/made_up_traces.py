"""Small profiles in the form that Kineto writes (torch 2.11, libkineto/src/output_json.cpp)."""

import gzip
import json

from sglang_tokenweave.timeline import overlap, steps
from sglang_tokenweave.timeline.trace import parse

ATTENTION = (
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...> > >"
)
GEMM = "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT"
SILU = "void flashinfer::activation::act_and_mul_kernel<__nv_bfloat16, &silu>(__nv_bfloat16*)"
NORM = "void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>(__nv_bfloat16*)"
NCCL = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
FUSED = "void allreduce_rmsnorm<Config<2, 8192, 512> >(Params)"
COPY = "Memcpy PtoP (Device -> Device)"
LOCAL_COPY = "Memcpy DtoD (Device -> Device)"
ADD_NORM = "void add_rmsnorm<512>(Params)"
BASE_US = 88511388202.755  # Kineto counts from a fixed date
COMPUTE, SIDE, LANE = 7, 23, 31  # streams


def event(name, start_us, length_us, stream=COMPUTE, device=0, cat="kernel", **arguments):
    """One thing that a GPU did."""
    args = {"External id": 5, "device": device, "context": 1, "stream": stream, "correlation": 9}
    return {
        "ph": "X", "cat": cat, "name": name, "pid": device, "tid": stream,
        "ts": round(BASE_US + start_us, 3), "dur": round(length_us, 3),
        "args": {**args, **arguments},
    }  # fmt: skip


def copy(name, start_us, length_us, stream=LANE):
    """A copy; one to another GPU names the devices another way, and not its own as others do."""
    found = event(name, start_us, length_us, stream, cat="gpu_memcpy", bytes=4096)
    if name == COPY:
        del found["args"]["device"], found["args"]["context"]
        found["args"] |= {"fromDevice": 0, "inDevice": 0, "toDevice": 1, "fromContext": 1}
    return found


def merged(events, rank):
    """Events as SGLang's merge of the ranks' profiles changes them."""
    return [{**each, "pid": f"[TP{rank:02d}] {each['pid']}"} for each in events]


def named(name, start_us, length_us, identity, stream=COMPUTE):
    """A range as it ran on a stream: a nanosecond earlier and longer than what is in it."""
    found = event(name, start_us - 0.001, length_us + 0.002, stream, cat="gpu_user_annotation")
    return {**found, "args": {"External id": identity}}


def noise():
    """What else such a file holds: metadata, the host, flows, an instant."""
    host = {"pid": 5143, "tid": 5143}
    return [
        {"name": "process_name", "ph": "M", "ts": BASE_US, **host, "args": {"name": "python"}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", **host, "ts": BASE_US, "dur": 7.5},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", **host, "ts": BASE_US,
         "dur": 3.0, "args": {"correlation": 9}},
        {"ph": "s", "id": 9, **host, "ts": BASE_US, "cat": "ac2g", "name": "ac2g"},
        {"ph": "X", "cat": "Trace", "ts": BASE_US, "dur": 1.0, "pid": "Spans", "tid": "PyTorch"},
        {"ph": "X", "cat": "cuda_sync", "name": "Stream Wait Event", "pid": 0, "tid": 7,
         "ts": BASE_US, "dur": 9.0, "args": {"stream": -1}},
        {"name": "Record Window End", "ph": "i", "s": "g", "pid": "", "tid": "", "ts": BASE_US},
    ]  # fmt: skip


def whole(events):
    return {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA H200"}],
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": 1775078550000000000,
        "traceEvents": [*noise(), *events],
        "traceName": "/tmp/1.TP-0.trace.json.gz",
    }


def write(path, events):
    """Write a profile, compressed as SGLang's are where the name says so."""
    text = json.dumps(whole(events)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def stock(layers=3):
    """One stream; the embedding's sum, two a layer of 10 us each, and the gather of logits."""
    events, now = [], 0.0
    names = [
        NCCL,
        *[ATTENTION, GEMM, NCCL, NORM, GEMM, SILU, GEMM, NCCL, NORM] * layers,
        GEMM,
        GATHER,
    ]
    for name in names:
        events.append(event(name, now, 10))
        now += 10
    return [named(f"step[EXTEND bs=1 toks={100 * layers}]", 0, now, 41), *events]


def woven(layers=3):
    """Two streams: each half's sum of 8 us beside the 10 us of the other half, then one alone."""
    events, now, sums = [], 0.0, []
    for _ in range(layers):
        for names in ((ATTENTION, GEMM), (GEMM, SILU)):
            for _half in range(2):
                for name in names:
                    events.append(event(name, now, 5))
                    now += 5
                sums.append(now)
    events += [event(FUSED, start, 8, SIDE) for start in sums[:-1]]
    events.append(event(FUSED, sums[-1], 8))
    step = f"step[EXTEND bs=1 toks={100 * layers}]"
    return [named(step, 0, now + 8, 42), named(step, sums[0], now - sums[0], 42, SIDE), *events]


def copied(operations=4, copies=2, name=COPY):
    """The copy engines' sums: 3 us of copies, 1 of norm, 3 of copies, every 20 us."""
    events = [event(GEMM, 0, 20 * operations)]
    for index in range(operations):
        now = 10.0 + 20 * index
        events += [copy(name, now, 3, LANE + lane) for lane in range(copies)]
        events.append(event(ADD_NORM, now + 3, 1, SIDE))
        events += [copy(name, now + 4, 3, LANE + lane) for lane in range(copies)]
    return events


def measured(events, index=None, parts=None):
    """Return a step of a profile, taken apart."""
    return overlap.measure(steps.choose(parse(whole(events), "made up"), index), parts, "made up")
