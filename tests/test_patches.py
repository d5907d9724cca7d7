"""patches/: each patch applies to its exact release, reverts without a trace, and does its work.

What a patched SGLang does is checked by `patches/checks.py` in a process of its own, on a tree of
links to the release with only the patched files copied.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
APPLY = ROOT / "patches" / "apply.py"
CHECKS = ROOT / "patches" / "checks.py"
VERSIONS = sorted(path.name for path in APPLY.parent.glob("0.*"))
NAMES = ["fp8-apply-into", "serve-help-plugins", "layer-loop"]
OVERLAYS = ROOT / ".venv" / "overlays"

spec = importlib.util.spec_from_file_location("patches_apply", APPLY)
apply = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = apply
spec.loader.exec_module(apply)


def patch_files(version):
    return sorted((APPLY.parent / version).glob("*.patch"))


def touched(version):
    return [file for path in patch_files(version) for file in apply.Patch.read(path).files]


def release_folder(version):
    """Return the folder that holds the `sglang/` of an unpatched release."""
    variable = f"TOKENWEAVE_TEST_SGLANG_{version.replace('.', '_')}"
    installed = importlib.util.find_spec("sglang")
    candidates = [
        os.environ.get(variable),
        installed and Path(installed.origin).parent.parent,
        OVERLAYS / version,
    ]
    for site in (Path(candidate) for candidate in candidates if candidate):
        found = metadata.distributions(name="sglang", path=[str(site)])
        if version in [distribution.version for distribution in found]:
            return site
    return pytest.fail(
        f"sglang {version} is not here: run `bash launch/setup.sh --overlay {version}`, "
        f"or set {variable} to the folder that holds its sglang/"
    )


def copy_release(version, site):
    """Copy of a release what `apply.py` reads and writes, nothing that could be imported."""
    source = release_folder(version)
    for file in ["sglang/__init__.py", *touched(version)]:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        if (source / file).exists():
            shutil.copy2(source / file, site / file)
    record = f"sglang-{version}.dist-info"
    shutil.copytree(source / record, site / record)
    return site


def run_apply(site, *arguments, **environment):
    assert (site / "sglang" / "__init__.py").exists()  # else Python would find the real one
    return subprocess.run(
        [sys.executable, "-B", APPLY, *arguments],
        env={**os.environ, "PYTHONPATH": str(site), **environment},
        capture_output=True,
        text=True,
    )


def snapshot(site):
    return {
        path.relative_to(site).as_posix(): (path.read_bytes(), path.stat().st_mode)
        for path in site.rglob("*")
        if path.is_file()
    }


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture
def site(version, tmp_path):
    return copy_release(version, tmp_path / "site")


def assert_refused(done, site, before, *texts):
    assert done.returncode == 1, done.stdout
    for text in texts:
        assert text in done.stderr
    assert snapshot(site) == before


# --- the patch files


def test_every_release_has_the_same_patches_in_mailbox_form(version):
    paths = patch_files(version)
    assert [apply.Patch.read(path).name for path in paths] == NAMES
    for path in paths:
        head, _, rest = path.read_text().partition("\n---\n")
        assert re.match(r"From \S+ .*\nFrom: .+\nDate: .+\nSubject: \[PATCH\] \[\w+\] .+\n\n", head)
        assert len(head.splitlines()) > 8, f"{path} does not say why"
        assert "diff --git" in rest


def test_no_file_is_in_two_patches(version):
    # So that each can be applied without the others, and its state be told from the files' hashes.
    assert len(touched(version)) == len(set(touched(version)))


def test_readme_names_every_patch_and_release():
    assert {"0.5.17", "0.5.21", "0.5.23"} <= set(VERSIONS)
    readme = (APPLY.parent / "README.md").read_text()
    for text in [*NAMES, *VERSIONS]:
        assert text in readme


# --- applying and reverting


@pytest.mark.parametrize("names", [*([name] for name in NAMES), NAMES[::-1]], ids="+".join)
def test_applies_and_reverts_to_the_identical_tree(version, site, names):
    before = snapshot(site)
    done = run_apply(site, *names)
    assert done.returncode == 0, done.stderr
    after = snapshot(site)
    patches = [apply.Patch.read(path) for path in patch_files(version)]
    expected = {file for patch in patches if patch.name in names for file in patch.files}
    assert {file for file in before | after if before.get(file) != after.get(file)} == expected
    for file in expected:
        compile((site / file).read_bytes(), file, "exec")
    listed = run_apply(site, "--list").stdout
    for name in NAMES:
        state = "applied" if name in names else "not applied"
        assert re.search(rf"^  {name} +{state}: ", listed, re.MULTILINE)

    done = run_apply(site, "--revert", *names)
    assert done.returncode == 0, done.stderr
    assert snapshot(site) == before


def test_hunks_are_where_the_patch_says(version, site):
    for path in patch_files(version):
        done = git(site, "apply", "-p2", "--check", "--verbose", path, GIT_DIR="/none")
        assert done.returncode == 0, done.stderr
        assert "offset" not in done.stderr


def test_check_changes_nothing(site):
    before = snapshot(site)
    done = run_apply(site, "--check", *NAMES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("can be applied") == len(NAMES)
    assert snapshot(site) == before


def git(folder, *arguments, **environment):
    # The user's settings and the repository around us stay out of it.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    clean |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", **environment}
    return subprocess.run(
        ["git", "-c", "user.name=me", "-c", "user.email=me@example.com", *arguments],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        check=not environment,
    )


def test_works_in_an_ignored_folder_of_a_checkout(version, tmp_path):
    # The trap: there `git apply` alone ends with status 0 and has changed nothing.
    (tmp_path / ".gitignore").write_text("/ignored/\n")
    git(tmp_path, "init", "-q")
    site = copy_release(version, tmp_path / "ignored" / "site")
    before = snapshot(site)
    done = run_apply(site, *NAMES, TMPDIR=str(site.parent), GIT_DIR=str(tmp_path / ".git"))
    assert done.returncode == 0, done.stderr
    assert {file for file, content in snapshot(site).items() if before.get(file) != content} == set(
        touched(version)
    )


def test_command_by_hand_of_the_readme(version, tmp_path):
    git(tmp_path, "init", "-q")
    site = copy_release(version, tmp_path / "site")
    command = re.search(r"`(GIT_DIR=\S+ git apply -p2 )", (APPLY.parent / "README.md").read_text())
    for path in patch_files(version):
        subprocess.run(f"{command[1]} '{path}'", shell=True, cwd=site, check=True)
    assert run_apply(site, "--list").stdout.count(" applied: ") == len(NAMES)


def test_applies_to_a_source_checkout_as_commits(version, tmp_path):
    site = copy_release(version, tmp_path / "checkout" / "python")
    git(site.parent, "init", "-q")
    git(site.parent, "add", "--all")
    git(site.parent, "commit", "-qm", "the release")
    git(site.parent, "am", "--keep-non-patch", *patch_files(version))
    subjects = git(site.parent, "log", "-3", "--reverse", "--format=%s").stdout.splitlines()
    assert subjects == [apply.Patch.read(path).subject for path in patch_files(version)]


# --- refusals: each names what is wrong and changes nothing


@pytest.mark.parametrize("wrong", ["0.5.18", "0.5.21.post1", "0.6.0"])
def test_refuses_a_release_without_patches(site, version, wrong):
    info = site / f"sglang-{version}.dist-info" / "METADATA"
    text = info.read_text()
    info.write_text(re.sub(r"^Version: .*$", f"Version: {wrong}", text, flags=re.MULTILINE))
    before = snapshot(site)
    for arguments in (["--list"], NAMES[:1], ["--revert", NAMES[0]]):
        done = run_apply(site, *arguments)
        assert_refused(done, site, before, f"no patches for sglang {wrong}", ", ".join(VERSIONS))


def test_refuses_the_files_of_another_release(tmp_path):
    site = copy_release("0.5.17", tmp_path / "site")
    info = site / "sglang-0.5.17.dist-info" / "METADATA"
    info.write_text(info.read_text().replace("Version: 0.5.17", "Version: 0.5.21"))
    before = snapshot(site)
    for name in ("fp8-apply-into", "serve-help-plugins"):
        assert_refused(run_apply(site, name), site, before, name)


def test_refuses_what_is_applied_already_and_then_the_others_too(site):
    assert run_apply(site, NAMES[1]).returncode == 0
    before = snapshot(site)
    assert_refused(run_apply(site, *NAMES), site, before, f"{NAMES[1]} is applied")


def test_refuses_to_revert_what_is_not_applied(site):
    assert run_apply(site, NAMES[1]).returncode == 0
    before = snapshot(site)
    done = run_apply(site, "--revert", *NAMES[1:])
    assert_refused(done, site, before, f"{NAMES[2]} is not applied")


@pytest.mark.parametrize("applied", [False, True])
def test_refuses_files_modified_by_something_else(site, applied):
    file = "sglang/srt/models/llama.py"
    if applied:
        assert run_apply(site, "layer-loop").returncode == 0
    with (site / file).open("a") as stream:
        stream.write("# local change\n")
    before = snapshot(site)
    for arguments in (["layer-loop"], ["--revert", "layer-loop"]):
        done = run_apply(site, *arguments)
        assert_refused(done, site, before, "layer-loop", file, "modified")
    assert "layer-loop          modified" in run_apply(site, "--list").stdout


def test_refuses_an_unknown_name(site):
    before = snapshot(site)
    assert_refused(run_apply(site, "layer-lop"), site, before, "no patch layer-lop", *NAMES)


def test_refuses_what_is_no_installed_wheel(site, version):
    shutil.rmtree(site / f"sglang-{version}.dist-info")
    before = snapshot(site)
    assert_refused(run_apply(site, NAMES[0]), site, before, "not one installed wheel")


def test_a_failed_write_undoes_the_others(tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    first.write_bytes(b"old")
    second.write_bytes(b"old")
    write = apply._write

    def fail_on_third(path, content):
        if path == third and content is not None:
            raise OSError("disk full")
        write(path, content)

    with (
        mock.patch.object(apply, "_write", fail_on_third),
        pytest.raises(OSError, match="disk full"),
    ):
        apply._replace({first: b"new", second: None, third: b"new"})
    assert snapshot(tmp_path).keys() == {"first", "second"}
    assert first.read_bytes() == second.read_bytes() == b"old"


def test_does_not_write_through_a_hard_link(site, tmp_path):
    # Installers may link the files of an environment to their cache, which must stay as it is.
    file = "sglang/cli/serve.py"
    cached = tmp_path / "cached.py"
    cached.hardlink_to(site / file)
    assert run_apply(site, "serve-help-plugins").returncode == 0
    assert cached.read_bytes() != (site / file).read_bytes()


# --- what the patches do, on a CPU


def link_release(source, target, copied):
    """Mirror a release by links; of `copied`, and the folders on the way there, make copies."""
    parents = {parent for file in copied for parent in Path(file).parents}

    def mirror(folder):
        (target / folder).mkdir(parents=True)
        for entry in (source / folder).iterdir():
            path = folder / entry.name
            if path in parents:
                mirror(path)
            elif path.as_posix() in copied:
                shutil.copy2(entry, target / path)
            elif entry.name != "__pycache__":  # Python would write into the original's
                (target / path).symlink_to(entry)

    mirror(Path("sglang"))


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """Return a function from a release's version to a folder that holds it, wholly patched."""

    @functools.cache
    def make(version):
        source, target = release_folder(version), tmp_path_factory.mktemp("patched")
        link_release(source, target, set(touched(version)))
        record = f"sglang-{version}.dist-info"
        shutil.copytree(source / record, target / record)
        done = run_apply(target, *NAMES)
        assert done.returncode == 0, done.stderr
        return target

    return make


def run_check(sites, *arguments, **environment):
    paths = [*map(str, sites), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-B", CHECKS, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "SGLANG_USE_CPU_ENGINE": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


PLUGIN = """
def add_flag(result, parser):
    parser.add_argument("--flag-of-a-plugin", help="as a plugin adds it")

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    target = "sglang.srt.server_args.ServerArgs.add_cli_args"
    HookRegistry.register(target, add_flag, HookType.AFTER)
"""


def test_serve_help_shows_the_flags_of_a_plugin(version, patched, tmp_path):
    (tmp_path / "a_plugin.py").write_text(PLUGIN)
    info = tmp_path / "a_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\na_plugin = a_plugin:register\n")
    stock = release_folder(version) / "sglang" / "cli" / "serve.py"
    sites = [patched(version), tmp_path]
    run_check(sites, "serve-help-plugins", str(stock), SGLANG_PLUGINS="a_plugin")


def test_layer_loop_is_called(version, patched):
    run_check([patched(version)], "layer-loop")


def test_fp8_linear_writes_into_storage_of_the_caller(version, patched):
    # Triton's interpreter runs SGLang's own kernels on the CPU.
    run_check([patched(version)], "fp8-apply-into", TRITON_INTERPRET="1")
