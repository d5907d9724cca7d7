"""Draw why the planner cuts where it does: docs/images/cut.svg, from `waves.py` itself.

`python docs/tools/cut.py [OUT]`: the waves of a layer of Llama-3.3-70B at TP=2 on 128 SMs, of both
halves together, for every cut of 2100 tokens.
"""

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from sglang_tokenweave.waves import OFF_THE_MIDDLE, best_cut, dense_layer, layer_waves

OUT = Path(__file__).resolve().parents[1] / "images" / "cut.svg"
TOKENS, SMS = 2100, 128
LAYER = dense_layer(8192, 64, 8, 128, 28672, world_size=2)


def main(out: Path) -> None:
    """Draw the waves over the cuts."""
    cuts = range(TOKENS // 4, TOKENS * 3 // 4 + 1)
    both = [layer_waves(LAYER, cut, SMS) + layer_waves(LAYER, TOKENS - cut, SMS) for cut in cuts]
    best = best_cut((TOKENS,), LAYER, SMS, 1)
    mpl.rcParams.update({"svg.hashsalt": "tokenweave", "font.size": 8, "svg.fonttype": "none"})
    figure, axis = plt.subplots(figsize=(9, 2.4), layout="constrained")
    middle, off = TOKENS / 2, TOKENS / OFF_THE_MIDDLE
    axis.axvspan(middle - off, middle + off, color="#dddddd", label="allowed")
    axis.step(cuts, both, where="mid", color="#3b6ea5", label="both halves")
    axis.axhline(layer_waves(LAYER, TOKENS, SMS), color="#777777", ls="--", label="unsplit")
    axis.axvline(best, color="#d08a2e", label=f"chosen: {best}")
    axis.set(xlabel=f"cut, of {TOKENS} tokens", ylabel="waves a layer")
    figure.legend(loc="outside upper right", ncols=3)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else OUT)
