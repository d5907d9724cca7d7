"""Run a program in a root of its own, as a container would: overlay layers, namespaces, no engine.

Linux's own parts, for which root is needed: unshare, overlayfs, bind mounts, chroot, setpriv. They
end with the process, even when it is killed: nothing stays mounted.
"""

import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


@dataclass(frozen=True)
class Bind:
    """A file or folder of this machine that the program sees at `target`."""

    source: Path
    target: str
    writable: bool = False


@dataclass(frozen=True)
class Sandbox:
    """Where and as whom a program runs; without `upper` the root is read-only, /tmp a tmpfs."""

    layers: Sequence[Path]  # the topmost first
    upper: Path | None = None  # takes what the program writes
    binds: Sequence[Bind] = ()
    user: str = "0:0"
    workdir: str = "/"

    def command(
        self, root: Path, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> list[str]:
        """Return a command that mounts at `root`, then becomes `arguments`, as process 1."""
        script = "\n".join(["set -e", *self._mounts(root), self._exec(root)])
        variables = [f"{name}={value}" for name, value in environment.items()]
        namespaces = ["--mount", "--pid", "--ipc", "--fork", "--kill-child"]
        return ["unshare", *namespaces, "bash", "-c", script, "sandbox", *variables, *arguments]

    def run(
        self,
        root: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        timeout_s: float,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, and remove the mount points that were made for it."""
        try:
            return subprocess.run(
                self.command(root, arguments, environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
            )
        finally:
            for bind in self.binds:
                self._remove_mount_point(bind.target)

    def _mounts(self, root: Path) -> Iterable[str]:
        options = f"lowerdir={':'.join(map(str, self.layers))}"
        if self.upper:
            work = self.upper.with_name(f"{self.upper.name}.work")
            work.mkdir(exist_ok=True)
            options += f",upperdir={self.upper},workdir={work}"
        yield _shell("mount", "-t", "overlay", "-o", options, "overlay", root)
        yield _shell("mount", "-t", "proc", "proc", f"{root}/proc")
        yield _shell("mount", "-t", "sysfs", "-o", "ro", "sysfs", f"{root}/sys")
        yield _shell("mount", "-t", "tmpfs", "-o", "mode=0755", "dev", f"{root}/dev")
        for name in _DEVICES:
            yield _shell("touch", f"{root}/dev/{name}")
            yield _shell("mount", "--bind", f"/dev/{name}", f"{root}/dev/{name}")
        yield _shell("ln", "-s", "/proc/self/fd", f"{root}/dev/fd")
        yield _shell("mkdir", f"{root}/dev/shm")
        tmpfs = ["/dev/shm"] if self.upper else ["/dev/shm", "/tmp"]
        for folder in tmpfs:
            yield _shell("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{root}{folder}")
        for bind in self.binds:
            target = f"{root}{bind.target}"
            if bind.source.is_dir():
                yield _shell("mkdir", "-p", target)
            else:
                yield _shell("mkdir", "-p", Path(target).parent)
                yield f"[ -e {shlex.quote(target)} ] || {_shell('touch', target)}"
            yield _shell("mount", "--bind", bind.source, target)
            if not bind.writable:
                yield _shell("mount", "-o", "remount,bind,ro", target)

    def _exec(self, root: Path) -> str:
        uid, _, gid = self.user.partition(":")
        drop = ["--reuid", uid, "--regid", gid or uid, "--clear-groups"]
        if uid != "0":
            # What `cap_drop: [ALL]` and `no-new-privileges` give.
            drop += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        enter = _shell("exec", "chroot", root, "setpriv", *drop, "env", "-i", "-C", self.workdir)
        return f'{enter} "$@"'

    def _remove_mount_point(self, target: str) -> None:
        assert self.upper, "only a writable root has mount points of its own"
        path = self.upper / target.lstrip("/")
        if path.is_file() and path.stat().st_size == 0:
            path.unlink()
            path = path.parent
        while path != self.upper and path.is_dir() and not os.listdir(path):
            path.rmdir()
            path = path.parent


def _shell(*words: object) -> str:
    return shlex.join(map(str, words))
