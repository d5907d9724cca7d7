"""Apply or revert the optional patches beside this file in the SGLang that Python imports.

python patches/apply.py [--list] [--check] [--revert] NAME...

An overlay is patched by putting it first on PYTHONPATH. SGLang itself is never imported.
"""
# ruff: noqa: T201 - a command-line program prints

import argparse
import base64
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata, util
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


class Refused(Exception):
    """The installed SGLang is not in the state that the request needs."""


class State(StrEnum):
    """How the files of a patch are in the installed SGLang."""

    CLEAN = "not applied"
    APPLIED = "applied"
    MODIFIED = "modified by something else"


@dataclass(frozen=True)
class Patch:
    """One patch file; `files` are relative to the folder that holds `sglang/`."""

    path: Path
    name: str
    subject: str
    files: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Patch":
        text = path.read_text()
        subject = re.search(r"^Subject: \[PATCH\] (.+)$", text, re.MULTILINE)
        files = re.findall(r"^diff --git a/\S+ b/python/(\S+)$", text, re.MULTILINE)
        if subject is None or not files:
            raise ValueError(f"{path} is not in the form of git format-patch")
        return cls(path, path.stem.partition("-")[2], subject[1], tuple(files))


@dataclass(frozen=True)
class Release:
    """An installed SGLang: the folder that holds `sglang/`, and the hashes of its wheel's files."""

    site: Path
    version: str
    hashes: Mapping[str, str]

    @classmethod
    def find(cls) -> "Release":
        """Find the SGLang that the running Python would import.

        Raises:
            Refused: there is none, or it was not installed from a wheel.
        """
        spec = util.find_spec("sglang")
        if spec is None or spec.origin is None:
            raise Refused(f"no sglang is installed for {sys.executable}")
        site = Path(spec.origin).parent.parent
        found = list(metadata.distributions(name="sglang", path=[str(site)]))
        if len(found) != 1 or not found[0].files:
            raise Refused(
                f"{site / 'sglang'} is not one installed wheel: "
                "in a source checkout use `git am`, see patches/README.md"
            )
        hashes = {str(file): file.hash.value for file in found[0].files if file.hash}
        return cls(site, found[0].version, hashes)

    def patches(self) -> dict[str, Patch]:
        """Return the patches for exactly this version by name, in the order of their numbers.

        Raises:
            Refused: there are none for this version.
        """
        folder = FOLDER / self.version
        if not folder.is_dir():
            supported = sorted(path.name for path in FOLDER.glob("0.*"))
            raise Refused(
                f"no patches for sglang {self.version} in {self.site}; "
                f"there are some for {', '.join(supported)}"
            )
        patches = (Patch.read(path) for path in sorted(folder.glob("*.patch")))
        return {patch.name: patch for patch in patches}

    def differing(self, folder: Path, files: Sequence[str]) -> list[str]:
        """Return those of `files` that are in `folder` not what the wheel put there."""
        return [file for file in files if _hash(folder / file) != self.hashes.get(file)]

    def state(self, patch: Patch) -> State:
        """Return whether `patch` is applied."""
        if not self.differing(self.site, patch.files):
            return State.CLEAN
        with self.stage([patch]) as folder:
            reverts = _git_apply(patch, folder, revert=True) is None
            if reverts and not self.differing(folder, patch.files):
                return State.APPLIED
        return State.MODIFIED

    @contextlib.contextmanager
    def stage(self, patches: Sequence[Patch]) -> Iterator[Path]:
        """Copy the files of `patches` into a temporary folder, laid out like the installed one."""
        with tempfile.TemporaryDirectory(prefix="sglang-patches-") as name:
            for file in {file for patch in patches for file in patch.files}:
                if (self.site / file).exists():
                    (Path(name) / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self.site / file, Path(name) / file)
            yield Path(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = _parse(arguments)
    try:
        release = Release.find()
        if options.list:
            _print_list(release)
        else:
            _run(release, options.names, revert=options.revert, check=options.check)
    except (Refused, OSError) as error:
        print(f"patches/apply.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="patches/apply.py",
        description="Apply optional patches to the installed SGLang: all of those named, or none.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a patch, as --list shows it")
    parser.add_argument("--list", action="store_true", help="show the patches and their states")
    parser.add_argument("--check", action="store_true", help="only say whether it would work")
    parser.add_argument("--revert", action="store_true", help="restore the files of the wheel")
    options = parser.parse_args(arguments)
    if options.list == bool(options.names):
        parser.error("give either --list or the NAME of a patch")
    return options


def _print_list(release: Release) -> None:
    patches = release.patches()
    width = max(map(len, patches))
    print(f"sglang {release.version} in {release.site}")
    for name, patch in patches.items():
        print(f"  {name:{width}}  {release.state(patch)}: {patch.subject}")


def _run(release: Release, names: Sequence[str], *, revert: bool, check: bool) -> None:
    patches = _select(release, names)
    if revert:
        patches.reverse()
    _require_state(release, patches, State.APPLIED if revert else State.CLEAN)
    with release.stage(patches) as folder:
        for patch in patches:
            problem = _git_apply(patch, folder, revert=revert)
            if problem is not None:
                raise Refused(f"{patch.name} does not apply to {release.site}: {problem}")
        files = [file for patch in patches for file in patch.files]
        if not check:
            _replace({release.site / file: _read(folder / file) for file in files})
    done = "reverted" if revert else "applied"
    for patch in patches:
        print(f"{patch.name}: {'can be ' if check else ''}{done} (sglang {release.version})")


def _select(release: Release, names: Sequence[str]) -> list[Patch]:
    patches = release.patches()
    unknown = [name for name in names if name not in patches]
    if unknown:
        raise Refused(
            f"no patch {', '.join(unknown)} for sglang {release.version}; "
            f"there are {', '.join(patches)}"
        )
    return [patch for name, patch in patches.items() if name in names]


def _require_state(release: Release, patches: Sequence[Patch], wanted: State) -> None:
    problems = []
    for patch in patches:
        state = release.state(patch)
        if state is State.MODIFIED:
            files = ", ".join(release.differing(release.site, patch.files))
            problems.append(f"{patch.name}: {files} {state}, reinstall sglang=={release.version}")
        elif state is not wanted:
            problems.append(f"{patch.name} is {state}")
    if problems:
        raise Refused(f"nothing changed in {release.site}: " + "; ".join(problems))


def _git_apply(patch: Patch, folder: Path, *, revert: bool) -> str | None:
    """Apply `patch` to the files in `folder`; return what git says against it, None for success."""
    # Below a git checkout `git apply` skips, with status 0, what is not in the current folder of
    # that checkout; and the user's settings could change what it writes. So it must find neither.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_DIR": str(folder / "no repository"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "LC_ALL": "C",
    }
    command = ["git", "apply", "-p2", "--whitespace=nowarn"] + ["--reverse"] * revert
    done = subprocess.run(
        [*command, str(patch.path)], cwd=folder, env=environment, capture_output=True, text=True
    )
    return None if done.returncode == 0 else done.stderr.strip()


def _replace(contents: Mapping[Path, bytes | None]) -> None:
    """Write the files, or remove those with None: all of them, or none when one step fails."""
    with contextlib.ExitStack() as undo:
        for path, content in contents.items():
            undo.callback(_write, path, _read(path))
            _write(path, content)
        undo.pop_all()


def _write(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
        return
    # Never written in place: an installer may have linked the file to its cache of wheels.
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_bytes(content)
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _hash(path: Path) -> str | None:
    """Return a file's hash in the form of a wheel's RECORD, None without a file."""
    content = _read(path)
    if content is None:
        return None
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    raise SystemExit(main())
