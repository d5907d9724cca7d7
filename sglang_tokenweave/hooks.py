"""Every place where SGLang calls us, in one table; registered with SGLang, then verified.

SGLang's HookRegistry logs a hook that does not take and goes on. We check each target once the
registry has applied its hooks: a missing one stops a strict server and is a stated reason else.
"""

import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sglang_tokenweave import chunks, flags, install, report


class Role(StrEnum):
    """What is lost without the hook."""

    FLAGS = "flags"  # the command line; registered even when TokenWeave is off
    WEAVE = "weave"  # weaving itself
    REPORT = "report"  # metrics, /server_info, the log line
    GUARD = "guard"  # plans that lose on the live load are dropped
    NUDGE = "nudge"  # --tokenweave-align-chunks


@dataclass(frozen=True)
class Hook:
    """One touch point: SGLang's function, how we attach, our handler, and why."""

    target: str
    kind: str  # a name of sglang.srt.plugins.hook_registry.HookType
    handler: Callable[..., Any]
    parameters: tuple[str, ...]  # the leading parameters of the target that the handler relies on
    role: Role
    why: str
    versions: str = "0.5.17 to 0.5.23"  # where the target was seen with these parameters


_SRT = "sglang.srt."
HOOKS = (
    Hook(
        target=_SRT + "server_args.ServerArgs.add_cli_args",
        kind="AFTER",
        handler=flags.add_arguments,
        parameters=("parser",),
        role=Role.FLAGS,
        why="our flags on every SGLang command line",
    ),
    Hook(
        target=_SRT + "server_args.ServerArgs.from_cli_args",
        kind="AFTER",
        handler=flags.check_arguments,
        parameters=("cls", "args"),
        role=Role.FLAGS,
        why="contradictory flags are refused before a process is spawned",
    ),
    Hook(
        target=_SRT + "model_executor.model_runner.ModelRunner.load_model",
        kind="AFTER",
        handler=install.after_load_model,
        parameters=("self",),
        role=Role.WEAVE,
        why="weights are loaded, the KV cache is not yet sized: decide, allocate, replace the loop",
    ),
    Hook(
        target=_SRT + "model_executor.model_runner.ModelRunner.init_attention_backends",
        kind="AFTER",
        handler=install.after_init_attention_backends,
        parameters=("self",),
        role=Role.WEAVE,
        why="each half of a batch needs attention metadata of its own",
    ),
    Hook(
        target=_SRT + "model_executor.model_runner.ModelRunner.init_cuda_graphs",
        kind="AFTER",
        handler=install.after_init_cuda_graphs,
        parameters=("self",),
        role=Role.WEAVE,
        why="beside SGLang's own graphs the woven ones are captured, and candidates can be timed",
    ),
    Hook(
        target=_SRT + "model_executor.model_runner.ModelRunner.forward",
        kind="AROUND",
        handler=install.around_forward,
        parameters=("self", "forward_batch"),
        role=Role.GUARD,
        why="every batch, in a graph or not: now and then one is timed and compared with stock",
    ),
    Hook(
        target=_SRT + "model_executor.runner.prefill_cuda_graph_runner"
        ".PrefillCudaGraphRunner.can_run_graph",
        kind="AROUND",
        handler=install.around_can_run_graph,
        parameters=("self", "forward_batch"),
        role=Role.WEAVE,
        why="a batch that will be woven must not replay the graph of an unwoven one",
    ),
    Hook(
        target=_SRT + "model_executor.runner.prefill_cuda_graph_runner"
        ".PrefillCudaGraphRunner.execute",
        kind="AROUND",
        handler=install.around_execute,
        parameters=("self", "forward_batch"),
        role=Role.WEAVE,
        why="a woven graph starts as directly as a stock one, without the copies of eager batches",
    ),
    Hook(
        target=_SRT + "managers.scheduler.Scheduler.run_batch",
        kind="AFTER",
        handler=report.after_run_batch,
        parameters=("self", "batch"),
        role=Role.REPORT,
        why="publish what was planned: Prometheus counters and a line in the log",
    ),
    Hook(
        target=_SRT + "managers.scheduler.Scheduler.get_internal_state",
        kind="AFTER",
        handler=report.after_get_internal_state,
        parameters=("self", "recv_req"),
        role=Role.REPORT,
        why="the `tokenweave` block of /server_info",
    ),
    Hook(
        target=_SRT + "managers.schedule_policy.PrefillAdder.__init__",
        kind="AFTER",
        handler=chunks.nudge_chunk_budget,
        parameters=("self", "page_size"),
        role=Role.NUDGE,
        why="shrink a chunk to a total that wastes no GEMM wave",
    ),
)


def register(hooks: Iterable[Hook], *, strict: bool) -> None:
    """Register `hooks` with SGLang and verify them as soon as the registry has applied them.

    Raises:
        SystemExit: from the registry's `apply_hooks`, when `strict` and a hook did not take.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = tuple(hooks)
    for hook in hooks:
        HookRegistry.register(hook.target, hook.handler, HookType[hook.kind])

    # Verification must come after *all* plugins registered and must not be swallowed: only the
    # registry's own last step is both. Applying early ourselves would lock out later plugins.
    original = HookRegistry.__dict__["apply_hooks"]

    def apply_and_verify() -> None:
        HookRegistry.apply_hooks = original
        HookRegistry.apply_hooks()
        missing = find_missing(hooks)
        if missing and strict:
            raise SystemExit("sglang_tokenweave: error: " + "; ".join(missing.values()))
        install.set_missing_hooks(
            {role: [missing[hook] for hook in missing if hook.role is role] for role in Role}
        )

    HookRegistry.apply_hooks = apply_and_verify


def find_missing(hooks: Iterable[Hook]) -> dict[Hook, str]:
    """Return the hooks that SGLang will not call, each with the reason."""
    problems = {hook: _problem(hook) for hook in hooks}
    return {hook: problem for hook, problem in problems.items() if problem is not None}


def _problem(hook: Hook) -> str | None:
    try:
        installed = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError) as error:
        return f"SGLang has no {hook.target} ({error}), needed to {hook.role}: {hook.why}"
    if not _calls(installed, hook.handler):
        return f"the hook on {hook.target} did not take, needed to {hook.role}: {hook.why}"
    names = tuple(inspect.signature(inspect.unwrap(_function(installed))).parameters)
    if names[: len(hook.parameters)] != hook.parameters:
        return (
            f"{hook.target} takes {names}, expected {hook.parameters} first, "
            f"needed to {hook.role}: {hook.why}"
        )
    return None


def _function(installed: Any) -> Any:
    return getattr(installed, "__func__", installed)


def _calls(installed: Any, handler: Callable[..., Any]) -> bool:
    """Whether the registry's wrappers around a target include one that calls `handler`."""
    function = _function(installed)
    while function is not None:
        if inspect.getclosurevars(function).nonlocals.get("hook") is handler:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
