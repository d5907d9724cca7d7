"""The part of docs/results.md that is generated: every committed result, and what there is none of.

`python docs/tools/results.py` draws the pictures that the page shows, into docs/images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import table
from benchmarks.roles import shapes
from benchmarks.schema import BENCHES, Result, load

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
_PLOTS = ("tokens", "ctas")  # that benchmarks.plot makes of a shape
# What a benchmark would show, for those that no file is of.
_SHOWS = {
    "op": "the communication op over a link, beside its rivals; the paper's figures 4 to 7 and 10",
    "one_gpu": "the fused kernel without a link",
    "prefill": "prefill latency of a served model; the paper's figures 2, 9 and 11",
    "decode": "a step of decode batches of a served model",
    "serving": "throughput and latency of a whole server under load; the paper's figures 12 and 13",
}


def parts(folder: Path = FOLDER) -> dict[str, str]:
    """Return the generated parts by name."""
    found = {path: load(path) for path in sorted(folder.glob("*.json"))}
    measured = {result.bench for result in found.values() if _is_of_its_subject(result)}
    missing = [f"- `{name}`: {_SHOWS[name]}." for name in BENCHES if name not in measured]
    sections = [_section(path, result) for path, result in found.items()]
    return {
        "measured": "\n\n".join(sections) or "No result is committed.",
        "not-measured": "\n".join(missing) or "Nothing: there is a result of every benchmark.",
    }


def _is_of_its_subject(result: Result) -> bool:
    """Whether ranks communicated, which all benchmarks but one are about."""
    return not result.meta.smoke and (result.meta.world_size > 1 or result.bench == "one_gpu")


def _section(path: Path, result: Result) -> str:
    source = f"[{path.name}](../benchmarks/results/{path.name})"
    pictures = [f"![{name}](images/{name})" for name in pictures_of(path.stem, result)]
    text = [
        f"### {path.stem}",
        f"{source}, by `{result.meta.command}`:",
        table.text(result),
        *pictures,
    ]
    return "\n\n".join(text)


def pictures_of(stem: str, result: Result) -> list[str]:
    """Return the names of the pictures that there are of a result."""
    names = [f"{stem}-{shape}-{plot}.png" for shape in shapes(result) for plot in _PLOTS]
    names.append(f"{stem}.png")  # of all loads of a server
    return [name for name in names if (IMAGES / name).exists()]


def main() -> None:
    """Draw every result that can be drawn."""
    from benchmarks.plot import PLOTTED, plot

    for path in sorted(FOLDER.glob("*.json")):
        result = load(path)
        if result.bench in PLOTTED and not result.meta.smoke:
            for written in plot(result, IMAGES, path.stem):
                print(f"wrote {written}")


if __name__ == "__main__":
    main()
