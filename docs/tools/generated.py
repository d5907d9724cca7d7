"""Write the parts of pages that are generated: `python docs/tools/generated.py [--check]`.

A part stands between `<!-- begin NAME: ... -->` and `<!-- end NAME -->`. With --check nothing is
written, and the status is 1 if a page differs from what would be.
"""

import argparse
import re
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks are not installed

import compatibility
import reliability
import results

from benchmarks import predict
from sglang_tokenweave.config import TokenWeaveConfig, flag

DOCS = Path(__file__).resolve().parents[1]
PARTS = {
    "tuning.md": ("options",),
    "compatibility.md": ("provenance", "models", "features", "variants", "refusals"),
    "results.md": ("measured", "not-measured"),
    "predictions.md": (
        "constants",
        "errors-own",
        "errors-ops",
        "errors-prefill",
        "prefill",
        "predictions",
    ),
    "reliability.md": ("faults-provenance", "faults", "sections"),
}


def main(argv: list[str]) -> int:
    """Write or check all pages; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is old")
    check = parser.parse_args(argv).check
    parts = {
        "options": options(),
        **compatibility.parts(),
        **reliability.parts(),
        **results.parts(),
        **predict.parts(),
    }
    old = []
    for name, names in PARTS.items():
        page = DOCS / name
        before = page.read_text()
        after = replace_parts(before, {part: parts[part] for part in names})
        if before != after:
            old.append(name)
            if not check:
                page.write_text(after)
    if old:
        print("differs from what is generated:" if check else "written:", *old)
    return 1 if check and old else 0


def replace_parts(page: str, parts: dict[str, str]) -> str:
    """Return `page` with each part's text between its two comments.

    Raises:
        ValueError: the page has no place for a part.
    """
    for name, text in parts.items():
        pattern = rf"(<!-- begin {name}: [^>]*-->\n).*?(<!-- end {name} -->)"
        page, count = re.subn(pattern, lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.S)
        if count != 1:
            raise ValueError(f"expected one place for {name}, found {count}")
    return page


def options() -> str:
    """Return the table of all options, from the configuration itself."""
    rows = ["| flag | keyword | default | meaning |", "|---|---|---|---|"]
    for option in fields(TokenWeaveConfig):
        default = "off" if option.default is False else f"`{option.default}`"
        text = option.metadata["help"]
        rows.append(f"| `{flag(option.name)}` | `{option.name}` | {default} | {text} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
