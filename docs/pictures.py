"""Draw docs/img/loss.svg from a run: `python docs/pictures.py runs/demo` (needs matplotlib)."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from pellucid.observe.reader import Reader

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#777777"  # Okabe & Ito 2008


def main(run_dir: str, bigram: float | None) -> None:
    with Reader(run_dir) as reader:
        steps, losses = reader.series(0, "loss", "run")
        held_steps, held = reader.series(0, "loss", "evaluation")
    figure, axes = plt.subplots(figsize=(7.2, 3.4), constrained_layout=True)
    axes.plot(steps + 1, losses, color=BLUE, linewidth=1, label="training loss, every step")
    axes.plot(held_steps, held, color=VERMILLION, marker="o", markersize=4, linewidth=1, label="held-out loss")
    if bigram is not None:
        axes.axhline(bigram, color=GREY, linestyle="--", linewidth=1, label="bigram model, held out")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    target = Path(__file__).parent / "img" / "loss.svg"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target)
    print(target)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else None)
