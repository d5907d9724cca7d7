#!/usr/bin/env bash
# Make .venv at the repository root ready: bash launch/setup.sh [--overlay SGLANG_VERSION]...
#
# With an NVIDIA GPU it holds `.[gpu,test,docs,examples]`; without one, SGLang on a CPU from the pins in
# launch/cpu/. --overlay puts another SGLang release into .venv/overlays/VERSION: first on PYTHONPATH,
# that release is the one Python imports. A stamp makes the second run short; one process at a time
# works (a lock); what an interrupted run left is thrown away by the next.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$here")
venv=$root/.venv
lock=$here/cpu/requirements.lock
source "$here/python.sh"
unset PYTHONPATH PYTHONHOME # pip would take what they name for installed

overlays=()
while (($#)); do
    [[ $1 == --overlay && ${2:-} =~ ^[0-9]+(\.[0-9a-z]+)+$ ]] ||
        fail "got '$*'; allowed: --overlay SGLANG_VERSION, as in --overlay 0.5.21"
    overlays+=("$2")
    shift 2
done

pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -qq "$@" ||
        fail "pip could not install what it names above: check the network and the disk," \
            "then run the same command again"
}

# Everything that decides what gets installed; another answer means: install again.
pins() {
    printf '%s\n' "$place"
    cat "$root/pyproject.toml" "$here/setup.sh" "$lock"
    find "$here/cpu/standins" -name '*.py' -o -name '*.toml' | LC_ALL=C sort | xargs -d '\n' cat
}

create_venv() {
    local python
    python=$(find_python)
    "$python" "$here/checks.py" disk "$root"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv or ensurepip module: install it" \
            "(Debian and Ubuntu: apt-get install python3-venv)"
    say "creating $venv with $("$python" --version)"
    mkdir -p "$venv"
    touch "$venv/unfinished" # until install() ends: this folder is not to be used or repaired
    "$python" -m venv "$venv"
    local pip
    pip=$("$venv/bin/python" -c 'import pip; print(pip.__version__)')
    ((${pip%%.*} >= 22)) ||
        fail "$python brings pip $pip, but 22 is needed: install a newer Python 3.11 or 3.12"
}

install() {
    touch "$venv/unfinished"
    if [[ $mode == gpu ]]; then
        say "installing SGLang for the GPU (several GB)"
        pip_install -e "${root}[gpu,test,docs,examples]"
    else
        # torch alone with its dependencies: some builds of it need libraries of their own.
        say "installing torch"
        pip_install -c "$lock" "$(grep '^torch==' "$lock")"
        say "installing SGLang for a CPU"
        pip_install --no-deps -r "$lock"
        pip_install --no-deps --no-build-isolation "$here/cpu/standins" -e "$root"
    fi
    printf '%s\n' "$place" >"$venv/place"
    pins | sha256sum >"$venv/stamp"
    rm "$venv/unfinished"
}

install_overlay() {
    local target=$venv/overlays/$1
    if [[ -d $target ]]; then return; fi
    say "installing SGLang $1 into $target"
    rm -rf "$target.partial"
    pip_install --no-deps --target "$target.partial" "sglang==$1"
    mv "$target.partial" "$target"
}

mode=cpu
if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then mode=gpu; fi
# A virtual environment cannot be moved, and that of a CPU does not grow into that of a GPU.
place="$mode $root"

command -v flock >/dev/null || fail "the command flock is missing: install util-linux"
mkdir -p "$root/.cache"
exec 9>"$root/.cache/setup.lock"
if ! flock --nonblock 9; then
    say "another set-up of this folder is running; waiting for it"
    flock --timeout 1800 9 || fail "the other set-up did not end within 30 minutes: stop it first"
fi

if [[ ! -e $venv/unfinished && $(cat "$venv/place" 2>/dev/null) == "$place" ]] &&
    "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    if [[ $(cat "$venv/stamp") != "$(pins | sha256sum)" ]]; then install; fi
else
    rm -rf "$venv"
    create_venv
    install
fi
for version in ${overlays[@]+"${overlays[@]}"}; do install_overlay "$version"; done
