"""From the launcher's command line to the server's."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from sglang_tokenweave import cpu

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv" / "bin" / "python"
DEMO_MODEL = ROOT / "launch" / "demo_model"

# Given to the launchers in their own way, not among the flags for SGLang.
OWN_FLAGS = (
    "--port",
    "--host",
    "--tp",
    "--tp-size",
    "--tensor-parallel-size",
    "--model-path",
    "--model",
)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; what follows `--` becomes `sglang_flags`.

    Raises:
        SystemExit: with status 2, after saying what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="bash launch/serve.sh",
        usage="%(prog)s [MODEL] [--port P] [--tp N] [--host H] [--wait S] [-- SGLANG FLAGS]",
        description="Set up and serve a model with TokenWeave.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder or, on a GPU, a Hugging Face name; default without a GPU: a demo model",
    )
    parser.add_argument("--port", type=int, default=30000, help="default: 30000")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--tp", type=int, help="ranks; default: the number of GPUs, 2 without")
    parser.add_argument(
        "--wait", type=float, metavar="S", help="seconds to start in; default: 240, on a GPU 1800"
    )
    end = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:end])
    options.sglang_flags = list(argv[end + 1 :])
    if not 1 <= options.port <= 65535:
        parser.error(f"--port is {options.port}; allowed: 1 to 65535")
    for given in options.sglang_flags:
        if given.partition("=")[0] in OWN_FLAGS:
            parser.error(f"{given} stands after the --; give MODEL, --port, --host, --tp before it")
    return options


def server_command(options: argparse.Namespace, model: str, tp_size: int, gpus: int) -> list[str]:
    """Return the command that starts the server; the user's flags come last, so they win."""
    command = [str(PYTHON), "-m", "sglang_tokenweave.launch_server", "--model-path", model]
    command += ["--host", options.host, "--port", str(options.port)]
    if gpus:
        command += ["--tp", str(tp_size)]
    else:
        # A prefill chunk on a CPU is 512 tokens: the default threshold would never be reached.
        command += [*cpu.server_arguments(tp_size), "--tokenweave-min-tokens", "64"]
    return [*command, *options.sglang_flags]


def server_environment(tp_size: int, gpus: int, scratch: str) -> dict[str, str]:
    """Return our environment with what the server needs; temporary files go to `scratch`."""
    environment = {
        **os.environ,
        # `-m` would otherwise look into the user's current folder before the installed packages.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    # The server sends itself a first request, which must not go through a proxy.
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join(filter(None, [environment.get(name), "127.0.0.1,localhost"]))
    if not gpus:
        # On a GPU the user's own folder stays: torch caches its compiled kernels in there.
        environment |= {**cpu.environment(tp_size), "TMPDIR": scratch}
    return environment


def loopback_url(host: str, port: int) -> str:
    """Return the address under which this machine reaches a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
