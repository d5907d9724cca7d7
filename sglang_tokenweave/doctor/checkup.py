"""Gather all facts of this machine and judge them."""

import os

from sglang_tokenweave import __version__
from sglang_tokenweave.doctor import hardware, machine, probes, software, system, versions
from sglang_tokenweave.doctor.facts import Facts
from sglang_tokenweave.doctor.findings import Finding
from sglang_tokenweave.doctor.forms import multicast_switches
from sglang_tokenweave.doctor.probe import PROBES


def gather() -> Facts:
    """Return what this machine is; at most two minutes."""
    here = machine.gather()
    answers = probes.gather(PROBES)
    return Facts(
        version=__version__,
        switches=multicast_switches(),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        machine=here,
        packages=software.gather_packages(),
        cache=software.gather_cache(in_container=bool(here.container)),
        **answers,
    )


def judge(facts: Facts) -> tuple[Finding, ...]:
    """Return everything there is to say about a machine, hardware first."""
    return (*hardware.judge(facts), *system.judge(facts), *versions.judge(facts))
