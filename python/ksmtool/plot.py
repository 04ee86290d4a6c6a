# SPDX-License-Identifier: MIT
"""A trial as a bar chart; needs the extra `ksmtool[plot]`."""

from __future__ import annotations

from pathlib import Path

from ksmtool.errors import KsmtoolError
from ksmtool.trial import Trial

MB = 1e6


def require() -> None:
    """Raise KsmtoolError if matplotlib is missing: to be found out before a trial, not after."""
    try:
        import matplotlib  # noqa: PLC0415

        matplotlib.use("Agg")
    except ImportError as error:
        raise KsmtoolError(
            "--plot needs matplotlib, which is not installed.",
            "pip install 'ksm-preload[plot]', or apt install python3-matplotlib",
        ) from error


def save(trial: Trial, path: Path) -> None:
    """Draw anonymous memory of every arm and write it to `path` (.svg or .png).

    Raises KsmtoolError if matplotlib is missing or the file cannot be written.
    """
    require()
    from matplotlib import pyplot  # noqa: PLC0415

    names = [arm.name for arm in trial.arms]
    sizes = [arm.anonymous / MB for arm in trial.arms]
    figure, axes = pyplot.subplots(figsize=(1.8 + 1.4 * len(names), 4.2), layout="constrained")
    bars = axes.bar(names, sizes, width=0.6, color=["#9aa5b1", *["#2f6f9f"] * (len(names) - 1)])
    labels = []
    for arm, size in zip(trial.arms, sizes):
        percent = arm.saved_percent
        labels.append(f"{size:.0f} MB" + ("" if percent is None else f"\n{-percent:+.0f} %"))
    axes.bar_label(bars, labels, padding=3)
    axes.set_ylim(0, max(sizes) * 1.18)
    axes.set_ylabel("anonymous memory, sum of Pss (MB)")
    axes.spines[["top", "right"]].set_visible(False)
    command = " ".join(" ".join(trial.command).split()).replace("$", r"\$")
    axes.set_title(
        f"{trial.copies} copies of {command if len(command) <= 32 else command[:29] + '...'}",
        fontsize=10,
    )
    try:
        figure.savefig(path)
    except OSError as error:
        raise KsmtoolError(f"Cannot write {path}: {error.strerror}.") from error
    finally:
        pyplot.close(figure)
