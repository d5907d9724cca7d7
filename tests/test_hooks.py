"""The table of hooks against the installed SGLang: every target takes, a missing one is named."""

import json
import os
import subprocess
import sys

import pytest

from sglang_tokenweave import cpu
from sglang_tokenweave.config import ENVIRONMENT_VARIABLE
from sglang_tokenweave.hooks import HOOKS, Role

# SGLang and its hooks stay out of pytest's own process: a hook cannot be taken back.
PRELUDE = """
import json, os
from sglang_tokenweave import hooks, install, plugin
from sglang.srt.plugins.hook_registry import HookRegistry
"""
SEAM = "sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends"
DELETE_SEAM = """
from sglang.srt.model_executor.model_runner import ModelRunner
del ModelRunner.init_attention_backends
"""


def run_python(code, options, environment):
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        env={**environment, ENVIRONMENT_VARIABLE: json.dumps(options)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def environment():
    return {**os.environ, **cpu.environment(1)}


def test_every_hook_takes_and_only_when_switched_on(environment):
    code = """
plugin.register()
HookRegistry.apply_hooks()
missing = hooks.find_missing(hooks.HOOKS)
print("RESULT", json.dumps({
    "missing": [hook.target for hook in missing],
    "reasons": install.state.reasons,
}))
"""
    on = run_python(code, {"enabled": True, "strict": True}, environment)
    assert on.returncode == 0, on.stderr
    assert _result(on) == {"missing": [], "reasons": []}

    off = _result(run_python(code, {}, environment))
    assert set(off["missing"]) == {hook.target for hook in HOOKS if hook.role is not Role.FLAGS}


def test_a_missing_seam_stops_a_strict_process_by_name(environment):
    code = DELETE_SEAM + "plugin.register()\nHookRegistry.apply_hooks()\n"
    result = run_python(code, {"enabled": True, "strict": True}, environment)
    assert result.returncode != 0
    assert f"error: SGLang has no {SEAM}" in result.stderr.splitlines()[-1]


def test_a_missing_seam_is_a_reason_otherwise(environment):
    code = (
        DELETE_SEAM
        + """
plugin.register()
HookRegistry.apply_hooks()
print("RESULT", json.dumps(install.state.reasons))
"""
    )
    result = run_python(code, {"enabled": True}, environment)
    assert result.returncode == 0, result.stderr
    (reason,) = _result(result)
    assert SEAM in reason


def test_a_changed_signature_is_named(environment):
    code = """
from sglang.srt.managers.scheduler import Scheduler
Scheduler.run_batch = lambda self, plan: None
plugin.register()
HookRegistry.apply_hooks()
print("RESULT", json.dumps(install.state.notes))
"""
    (note,) = _result(run_python(code, {"enabled": True}, environment))
    assert "run_batch takes ('self', 'plan'), expected ('self', 'batch')" in note


def test_a_replaced_target_is_named(environment):
    """Another program puts its own function over ours after the registry applied it."""
    code = """
plugin.register()
HookRegistry.apply_hooks()
from sglang.srt.managers.scheduler import Scheduler
Scheduler.run_batch = lambda self, batch: None
print("RESULT", json.dumps(list(hooks.find_missing(hooks.HOOKS).values())))
"""
    (problem,) = _result(run_python(code, {"enabled": True}, environment))
    assert "run_batch did not take" in problem


def test_other_plugins_keep_their_hooks_on_our_targets(environment):
    """We verify after everybody registered; applying early would have locked them out."""
    code = """
from sglang.srt.plugins.hook_registry import HookType
plugin.register()
def theirs(result, *args, **kwargs):
    return None
target = "sglang.srt.managers.scheduler.Scheduler.run_batch"
HookRegistry.register(target, theirs, HookType.AFTER)
HookRegistry.apply_hooks()
from sglang.srt.managers.scheduler import Scheduler
print("RESULT", json.dumps({
    "ours": not hooks.find_missing(hooks.HOOKS),
    "theirs": hooks._calls(Scheduler.run_batch, theirs),
}))
"""
    assert _result(run_python(code, {"enabled": True}, environment)) == {
        "ours": True,
        "theirs": True,
    }


def test_the_table_names_each_target_once_and_says_why():
    assert len({hook.target for hook in HOOKS}) == len(HOOKS)
    assert all(hook.why for hook in HOOKS)


def _result(process):
    assert process.returncode == 0, process.stderr
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))
