"""Draw how the demo model learnt: `python -m launch.plot_training` (needs the extra `bench`)."""

import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "launch" / "demo_model" / "training.json"
PICTURE = ROOT / "docs" / "demo_model_training.png"


def main() -> None:
    """Draw the losses of training.json into docs/."""
    record = json.loads(RECORD.read_text())
    points = record["bits_per_byte"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("training", "training text"), ("held_out", "held-out modules")):
        axes.plot([at["step"] for at in points], [at[name] for at in points], label=label)
    recipe = record["recipe"]
    axes.axvline(recipe["steps"] * (1 - recipe["last_share"]), color="gray", linestyle=":")
    axes.set_xlabel(f"step of {recipe['tokens_per_step']} bytes (dotted: longer windows from here)")
    axes.set_ylabel("bits per byte")
    axes.set_title("The demo model learns the standard library")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE)


if __name__ == "__main__":
    main()
