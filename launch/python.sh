# shellcheck shell=bash
# Sourced by the scripts beside it: which Python, and how to stop with one clear sentence.

say() { printf '[%s] %s\n' "$(basename "$0" .sh)" "$*"; }

fail() {
    printf '[%s] error: %s\n' "$(basename "$0" .sh)" "$*" >&2
    exit 2
}

# Print the Python to use: $PYTHON where it is set, else the first of the usual names that runs.
find_python() {
    local candidate candidates=(python3.12 python3.11 python3)
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        # Run it: under pyenv a name may exist and still start nothing.
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
            >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "none of ${candidates[*]} is Python 3.11 or 3.12: install one of the two," \
        "or name it, as in PYTHON=/path/to/python3.12 bash $0"
}
