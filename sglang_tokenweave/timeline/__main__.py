"""The command line of the timeline; docs/timeline.md explains what it shows."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang_tokenweave.timeline import overlap, page, steps, trace, words
from sglang_tokenweave.timeline.overlap import Overlap
from sglang_tokenweave.timeline.trace import TraceError

DONE, FAILED, USAGE = 0, 1, 2


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m sglang_tokenweave.timeline",
        description="Show what communication of a step was hidden, and what exposed, and where.",
        epilog="exit code: 0; 1 the profile does not show what is asked for; 2 bad arguments",
    )
    found.add_argument("trace", type=Path, help="a rank's profile: .trace.json or .trace.json.gz")
    found.add_argument("--step", type=int, help="which step, from 0; without it, the longest")
    found.add_argument("--compare", type=Path, metavar="OTHER", help="a second profile, beside it")
    found.add_argument("--compare-step", type=int, metavar="N", help="which step of the second")
    found.add_argument("--device", type=int, help="which GPU, if a profile shows several")
    found.add_argument(
        "--parts", type=int, choices=(1, 2), help="what the batch was cut into; without it, guessed"
    )
    found.add_argument("--list", action="store_true", help="only list the steps")
    found.add_argument("--output", type=Path, default=Path(), help="folder for the two files")
    return found


def main(arguments: Sequence[str]) -> int:
    """Write a page and a picture, say the sentence, and return the exit code."""
    options = parser().parse_args(arguments)
    if options.compare_step is not None and options.compare is None:
        parser().error("--compare-step goes with --compare")
    try:
        if options.list:
            _list(options.trace, options.device)
            return DONE
        shown = [_read(options.trace, options.step, options)]
        if options.compare is not None:
            shown.append(_read(options.compare, options.compare_step, options))
    except TraceError as error:
        sys.stderr.write(f"error: {error}\n")
        return FAILED
    for title, each in shown:
        sys.stdout.write(f"{title}\n  {words.summary(each)}\n  {words.sentence(each)}\n")
    if len(shown) > 1:
        sys.stdout.write(words.comparison(shown[0][1], shown[1][1]) + "\n")
    _write(shown, options.output, options.trace)
    return DONE


def _list(path: Path, device: int | None) -> None:
    for step in steps.steps(trace.load(path).of_device(device)):
        length = words.duration(step.end - step.start)
        sys.stdout.write(
            f"{step.index}: {step.name}, {length}, {len(step.activities)} activities\n"
        )


def _read(path: Path, index: int | None, options: argparse.Namespace) -> tuple[str, Overlap]:
    found = trace.load(path).of_device(options.device)
    step = steps.choose(found, index)
    measured = overlap.measure(step, options.parts, found.source)
    return f"{path.name}, step {step.index}", measured


def _write(shown: Sequence[tuple[str, Overlap]], folder: Path, path: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".trace")
    base = folder / f"{stem}-step{shown[0][1].step.index}"
    html = base.with_name(base.name + ".html")
    html.write_text(page.page(shown), encoding="utf-8")
    sys.stdout.write(f"wrote {html}\n")
    if importlib.util.find_spec("matplotlib") is None:
        sys.stderr.write(
            'no picture: it needs matplotlib; pip install "sglang-tokenweave[bench]"\n'
        )
        return
    from sglang_tokenweave.timeline.picture import picture

    png = base.with_name(base.name + ".png")
    picture(shown, png)
    sys.stdout.write(f"wrote {png}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
