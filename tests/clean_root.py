"""Images built from Debian's packages alone, for the tests of the containers."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile import Build, Image
from sandbox import Bind

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "launch" / "docker" / "Dockerfile"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def require() -> None:
    """Skip where a clean root cannot be made; in CI that is a failure."""
    reason = _obstacle()
    if reason and os.environ.get("CI"):
        pytest.fail(f"CI must run this test, but {reason}")
    if reason:
        pytest.skip(reason)


def _obstacle() -> str:
    if os.getuid() != 0:
        return "a chroot needs root"
    for program in ("mmdebstrap", "unshare", "setpriv"):
        if shutil.which(program) is None:
            return f"{program} is missing (Debian: apt-get install mmdebstrap util-linux)"
    probe = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return "this machine forbids new namespaces" if probe.returncode else ""


def debian(folder: Path) -> Image:
    """Make a root with Python and nothing else, in the place of the official Python image."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if line
    )
    sources = [*Path("/etc/apt").glob("sources.list"), *Path("/etc/apt").glob("sources.list.d/*")]
    root = folder / "debian"
    subprocess.run(
        [
            *("mmdebstrap", "--quiet", "--variant=minbase"),
            "--include=python3,python3-venv,ca-certificates",
            *(release["VERSION_CODENAME"], root),
            *(path for path in sources if path.suffix in (".list", ".sources")),
        ],
        check=True,
        timeout=600,
    )
    return Image((root,), {"PATH": _PATH})


def image_build(folder: Path, device: str, bases: dict[str, Image]) -> Build:
    """Return a build of the Dockerfile with `bases` in the place of the images it names."""
    environment, binds = _pip()
    return Build(
        DOCKERFILE,
        context=ROOT,
        folder=folder,
        bases=bases,
        build_args={
            "DEVICE": device,
            "PYTHON_IMAGE": "python",
            "SGLANG_IMAGE": "sglang",
            # The one that the Dockerfile itself declares.
            "PIP_EXTRA_INDEX_URL": environment.get("PIP_EXTRA_INDEX_URL", ""),
        },
        host_environment=environment,
        host_binds=[*binds, Bind(Path("/etc/resolv.conf"), "/etc/resolv.conf")],
    )


def _pip() -> tuple[dict[str, str], list[Bind]]:
    """Return how pip finds its packages on this machine, as environment and folders."""
    listing = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True)
    environment, binds = {}, {}
    for line in listing.splitlines():
        name, _, quoted = line.partition("=")
        values = ast.literal_eval(quoted).split()
        environment[f"PIP_{name.rpartition('.')[2].upper().replace('-', '_')}"] = " ".join(values)
        for value in values:
            path = Path(value.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # An index refers to the files beside it.
                path = path.parent if value.startswith("file://") else path
                binds[path] = Bind(path, str(path))
    if _CERTIFICATES.is_file():
        binds[_CERTIFICATES] = Bind(_CERTIFICATES, str(_CERTIFICATES))
    return environment, list(binds.values())
