"""Draw ``docs/accuracy.svg``, the accuracy by photos per class, from the first table of benchmarks/accuracy.md."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TABLE = HERE.parent / "benchmarks/accuracy.md"
METHODS = {
    "zero-shot": ("zero-shot CLIP", "0.6"),
    "Tip-Adapter searched": ("Tip-Adapter", "tab:orange"),
    "linear probe": ("logistic regression", "tab:blue"),
    "the default": ("retrieval-tip", "tab:red"),
}
"""For each column, the name of the method and its colour."""
DATASETS = {
    "DTD": "DTD",
    "Stanford Cars": "Stanford Cars",
    "Flowers102, images only": "Flowers102, images only",
    "9 classes of Food-101": "Food-101, 9 classes",
}
"""For each dataset, its title. The default gains much on the first ones, and nothing on the last."""


def rows() -> list[dict[str, str]]:
    """Return the rows of the table."""
    lines = re.findall(
        r"^\|(.*)\|$", TABLE.read_text(encoding="utf-8").partition("\nECE:")[0], re.MULTILINE
    )
    head, _, *body = ([cell.strip() for cell in line.split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in body]


def main() -> None:
    """Draw one diagram per dataset, side by side."""
    plt.rcParams.update({"svg.hashsalt": "curves", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(1, len(DATASETS), figsize=(11, 2.7), layout="constrained")
    for axis, (dataset, title) in zip(axes, DATASETS.items(), strict=True):
        for column, (name, colour) in METHODS.items():
            found = [
                (int(row["shots"]), row[column].split(" ")[0])
                for row in rows()
                if row[""] == dataset
            ]
            points = [(shots, float(accuracy)) for shots, accuracy in found if accuracy]
            axis.plot(
                *zip(*points, strict=True), "o-", ms=3, color=colour, label=name
            ) if points else None
        axis.set(title=title, xscale="log", xlabel="photos per class")
        axis.set_xticks([1, 2, 4, 8, 16], labels=["1", "2", "4", "8", "16"])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy, %")
    axes[-1].legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(HERE / "accuracy.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
