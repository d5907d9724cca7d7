"""Ranks of a copy engine on a CPU: what they enqueue is recorded, and then run in any order.

A recorder takes the driver's place while one rank's host code runs. Its memory is real: addresses
are those of tensors. What comes out is that rank's program, streams of steps, which is replayed for
ever like a captured graph: numerically in random orders (`Run`), or in every order (exploring.py).
"""

import ctypes
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from cuda.bindings import driver as real

from sglang_tokenweave import add_rmsnorm, compiler, driver, stream_flags
from sglang_tokenweave.compiler import Compiled, Resources
from sglang_tokenweave.kernels import FP8

_DTYPES = {"Bf16": torch.bfloat16, "Fp16": torch.float16}


@dataclass(frozen=True)
class After:
    """The stream goes on when another one, of the same rank, has come to a position."""

    stream: int
    position: int


@dataclass(frozen=True)
class Copy:
    target: int
    source: int
    num_bytes: int


@dataclass(frozen=True)
class Write:
    address: int
    value: int


@dataclass(frozen=True)
class Wait:
    address: int
    value: int


@dataclass(frozen=True)
class Add:
    """The kernel `add_rmsnorm`."""

    expression: str
    num_blocks: int
    params: add_rmsnorm.Params


@dataclass(frozen=True)
class Call:
    """The caller's own computation."""

    function: Callable[[int], None]  # of the replay
    op: int  # before which it comes


Step = After | Copy | Write | Wait | Add | Call


@dataclass
class Program:
    """What one rank enqueued: steps by stream."""

    streams: dict[int, list[Step]] = field(default_factory=dict)

    def before(self, stream: int, position: int) -> list[Step]:
        """Return the steps that come before a position of a stream in every order."""
        reached: dict[int, int] = {}
        asked = [After(stream, position)]
        while asked:
            each = asked.pop()
            steps = self.streams[each.stream][reached.get(each.stream, 0) : each.position]
            asked += [step for step in steps if isinstance(step, After)]
            reached[each.stream] = max(reached.get(each.stream, 0), each.position)
        return [step for each, end in reached.items() for step in self.streams[each][:end]]

    def replace(self, drops: Callable[[Step], bool]) -> "Program":
        """Return a program in which some steps do nothing."""
        return Program(
            {
                stream: [After(stream, 0) if drops(step) else step for step in steps]
                for stream, steps in self.streams.items()
            }
        )


class Recorder:
    """Stands for cuda.bindings.driver; whatever a rank enqueues is in `program`."""

    CALLER = 1

    def __init__(self, fails: str = "") -> None:
        """`fails`: a function that is out of memory."""
        self._fails = fails
        self.program = Program({self.CALLER: []})
        self.live: list[object] = []  # what was created and not destroyed
        self._handles = iter(range(self.CALLER + 1, 10**6))
        self._events: dict[int, After] = {}
        self._host = {}

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "__dict__").get("_fails"):
            return lambda *_: (real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
        return object.__getattribute__(self, name)

    def __getattr__(self, name):
        if name.startswith("cu") and not name.startswith("cuuint"):
            raise AttributeError(f"the recorder has no {name}")
        return getattr(real, name)

    def install(self, monkeypatch) -> None:
        monkeypatch.setattr(driver, "bindings", lambda: self)
        stream = SimpleNamespace(cuda_stream=self.CALLER)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr(compiler, "compile_kernel", _stub_compile)

    def call(self, function, op=0):
        """Enqueue a computation of the caller's own."""
        self.program.streams[self.CALLER].append(Call(function, op))

    def _created(self, handle):
        self.live.append(handle)
        return real.CUresult.CUDA_SUCCESS, handle

    def _destroyed(self, handle):
        self.live.remove(handle)
        return (real.CUresult.CUDA_SUCCESS,)

    def _enqueued(self, stream, *steps):
        self.program.streams[stream].extend(steps)
        return (real.CUresult.CUDA_SUCCESS,)

    def cuCtxGetCurrent(self):
        return real.CUresult.CUDA_SUCCESS, "context"

    def cuCtxSetCurrent(self, context):
        assert context == "context"
        return (real.CUresult.CUDA_SUCCESS,)

    def cuStreamQuery(self, stream):
        """Run what is on the stream, which must be copies."""
        for copy in self.program.streams[stream]:
            ctypes.memmove(copy.target, copy.source, copy.num_bytes)
        self.program.streams[stream].clear()
        return (real.CUresult.CUDA_SUCCESS,)

    def cuDeviceGet(self, index):
        return real.CUresult.CUDA_SUCCESS, index

    def cuStreamCreate(self, flags):
        return self.cuStreamCreateWithPriority(flags, 0)

    def cuStreamCreateWithPriority(self, flags, priority):
        assert flags == real.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = next(self._handles)
        self.program.streams[stream] = []
        return self._created(stream)

    def cuEventCreate(self, _flags):
        return self._created(next(self._handles))

    cuStreamDestroy = cuEventDestroy = _destroyed

    def cuMemHostAlloc(self, num_bytes, _flags):
        buffer = ctypes.create_string_buffer(num_bytes)
        self._host[ctypes.addressof(buffer)] = buffer
        return self._created(ctypes.addressof(buffer))

    def cuMemHostGetDevicePointer(self, address, _flags):
        return real.CUresult.CUDA_SUCCESS, address

    def cuMemFreeHost(self, address):
        del self._host[address]
        return self._destroyed(address)

    def cuLibraryLoadData(self, cubin, *_):
        return real.CUresult.CUDA_SUCCESS, cubin

    def cuLibraryGetKernel(self, _library, name):
        return real.CUresult.CUDA_SUCCESS, name.decode()

    def cuKernelSetAttribute(self, *_):
        return (real.CUresult.CUDA_SUCCESS,)

    def cuFuncLoad(self, _function):
        return (real.CUresult.CUDA_SUCCESS,)

    def cuKernelGetFunction(self, kernel):
        return real.CUresult.CUDA_SUCCESS, kernel

    def cuEventRecord(self, event, stream):
        self._events[event] = After(stream, len(self.program.streams[stream]))
        return (real.CUresult.CUDA_SUCCESS,)

    def cuStreamWaitEvent(self, stream, event, _flags):
        return self._enqueued(stream, self._events[event])

    def cuMemcpyAsync(self, target, source, num_bytes, stream):
        return self._enqueued(stream, Copy(target, source, num_bytes))

    def cuStreamBatchMemOp(self, stream, count, ops, flags):
        assert (count, flags) == (len(ops), 0)
        return self._enqueued(stream, *map(_memory_op, ops))

    def cuLaunchKernel(self, function, *arguments):
        *shape, stream, pointers, _extra = arguments
        (address,) = (ctypes.c_void_p * 1).from_address(pointers)
        if function.startswith("add_rmsnorm"):
            params = _copy_of(add_rmsnorm.Params, address)
            return self._enqueued(stream, Add(function, shape[0], params))
        assert function.startswith("exchange_flags")
        assert shape[:6] == [1, 1, 1, 32, 1, 1]
        return self._exchange(stream, _copy_of(stream_flags.Params, address))

    def _exchange(self, stream, params):
        """Record each lane of the warp as a stream of its own: they need not go in step."""
        begun = After(stream, len(self.program.streams[stream]))
        ended = []
        for theirs, mine in zip(params.theirs, params.mine, strict=True):
            if theirs or mine:
                lane = next(self._handles)
                told = [Write(theirs, 1)] if theirs else []
                waited = [Wait(mine, 1), Write(mine, 0)] if mine else []
                steps = [begun, *told, *waited]
                self.program.streams[lane] = steps
                ended.append(After(lane, len(steps)))
        return self._enqueued(stream, *ended)


def _stub_compile(_file, expression, _arch):
    return Compiled(expression.encode(), expression, Resources(0, 0, 0, 0, 0), None)


def _copy_of(struct, address):
    return struct.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(struct)))


def _memory_op(op):
    kinds = real.CUstreamBatchMemOpType
    if op.operation == kinds.CU_STREAM_MEM_OP_WRITE_VALUE_32:
        assert op.writeValue.flags == real.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        return Write(int(op.writeValue.address), int(op.writeValue.value))
    assert op.operation == kinds.CU_STREAM_MEM_OP_WAIT_VALUE_32
    assert op.waitValue.flags == real.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
    return Wait(int(op.waitValue.address), int(op.waitValue.value))


def word_at(address):
    return ctypes.c_uint32.from_address(address)


def tensor_at(address, dtype, *shape):
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    memory = (ctypes.c_char * num_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def add(step):
    """Do what the kernel does, in its order of additions."""
    p = step.params
    names = step.expression.removeprefix("add_rmsnorm<").split(", ")
    dtype, is_fp8, num_ranks = _DTYPES[names[0]], names[1] == "true", int(names[2])
    assert step.num_blocks == max(p.num_rows, 1)
    word_at(p.count).value += p.num_ops
    if p.watched:
        word_at(p.watched + 4).value = word_at(p.count).value
        word_at(p.watched).value = p.next_phase
    shape = (p.num_rows, p.hidden)
    total = torch.zeros(shape)
    for rank in range(num_ranks):
        total += tensor_at(p.parts[rank], dtype, *shape).float()
    if p.residual:
        residual = tensor_at(p.residual, dtype, *shape)
        total += residual.float()
        residual.copy_(total)
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + p.eps)
    values = total * scale * (p.weight_offset + tensor_at(p.weight, dtype, p.hidden).float())
    if is_fp8:
        scales = values.abs().amax(-1) / 448
        tensor_at(p.scales, torch.float32, p.num_rows).copy_(scales)
        values = values / scales[:, None]
    tensor_at(p.out, FP8 if is_fp8 else dtype, *shape).copy_(values)


class Stuck(AssertionError):
    """All streams wait."""


class Run:
    """Replays all ranks' programs in a random order of their steps."""

    def __init__(self, programs: list[Program], seed: int, late_rank: int | None = None) -> None:
        self._programs = programs
        self._random = random.Random(seed)
        self._late_rank = late_rank
        self._positions = [dict.fromkeys(program.streams, 0) for program in programs]
        self._replays = [0] * len(programs)

    def replay(self, count: int) -> None:
        """Run until each rank has replayed its program `count` times.

        Raises:
            Stuck: nobody can go on.
        """
        while min(self._replays) < count:
            ready = [
                (rank, stream)
                for rank, program in enumerate(self._programs)
                for stream in program.streams
                if self._replays[rank] < count and self._is_ready(rank, stream)
            ]
            if not ready:
                raise Stuck(f"nobody can go on: {self._positions}")
            # A late rank moves when nobody else can.
            in_time = [choice for choice in ready if choice[0] != self._late_rank]
            self._step(*self._random.choice(in_time or ready))

    def _is_ready(self, rank, stream):
        position, steps = self._positions[rank][stream], self._programs[rank].streams[stream]
        if position == len(steps):
            return False
        step = steps[position]
        if isinstance(step, After):
            return self._positions[rank][step.stream] >= step.position
        return not isinstance(step, Wait) or word_at(step.address).value == step.value

    def _step(self, rank, stream):
        positions = self._positions[rank]
        step = self._programs[rank].streams[stream][positions[stream]]
        if isinstance(step, Copy):
            ctypes.memmove(step.target, step.source, step.num_bytes)
        elif isinstance(step, Write):
            word_at(step.address).value = step.value
        elif isinstance(step, Add):
            add(step)
        elif isinstance(step, Call):
            step.function(self._replays[rank])
        positions[stream] += 1
        if all(positions[s] == len(steps) for s, steps in self._programs[rank].streams.items()):
            positions.update(dict.fromkeys(positions, 0))
            self._replays[rank] += 1
