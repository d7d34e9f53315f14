"""The demo's table and its figure."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from lightning_sop.zoo.demo.experiment import Run, Setting
from lightning_sop.zoo.demo.intervals import Estimate, estimate, paired_difference

ARMS = ("plain", "Majority Kernels")


def make_table(setting: Setting, plain: Sequence[Run], majority: Sequence[Run], ratio: float) -> Table:
    """One table of everything that was measured.

    Args:
        setting: what every run shared.
        plain: runs of the plain network, one a seed.
        majority: runs with Majority Kernels, of the same seeds in the same order.
        ratio: time of a step over the plain network's.
    """
    table = Table(
        "",
        *ARMS,
        "difference",
        title=f"Digits, perceptron 64-{setting.width}-{setting.width}-10, k={setting.factor}, "
        f"{setting.epochs} epochs, {len(plain)} seeds",
        caption=verdict(plain, majority),
        caption_justify="left",
    )
    first, other = plain[0], majority[0]
    table.add_row("parameters, training", *_counts(first.parameters_training, other.parameters_training))
    table.add_row("parameters, deployed", *_counts(first.parameters_deployed, other.parameters_deployed))
    table.add_row("deploy file, bytes", *_counts(first.deploy_bytes, other.deploy_bytes))
    table.add_row("test accuracy, %", *_compare(plain, majority, lambda run: 100 * run.test_acc, 2))
    table.add_row("test loss, nats", *_compare(plain, majority, lambda run: run.test_loss, 4))
    table.add_row("time of a step", "1.00", f"{ratio:.2f}", f"{ratio - 1:+.0%}")
    table.add_row("receipt: largest output difference", _receipt(plain), _receipt(majority), "")
    return table


def verdict(plain: Sequence[Run], majority: Sequence[Run]) -> str:
    """What the intervals of the paired differences allow to say, gain or not."""
    accuracy = paired_difference([run.test_acc for run in majority], [run.test_acc for run in plain])
    loss = paired_difference([run.test_loss for run in majority], [run.test_loss for run in plain])
    return (
        "± is the 95% interval over seeds; differences are paired by seed. "
        f"Accuracy: {_judge(accuracy, larger_is_better=True)}. Loss: {_judge(loss, larger_is_better=False)}. "
        "In a network this small a step is mostly overhead of calls: its time ratio is not that of larger ones."
    )


def draw_curves(plain: Sequence[Run], majority: Sequence[Run], path: Path) -> None:
    """Write a PNG of validation loss and accuracy by epoch: one thin line a seed, a thick one for their mean.

    Args:
        plain: runs of the plain network.
        majority: runs with Majority Kernels.
        path: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: pyplot's state and the user's backend are left alone
    panels: list[tuple[str, str, Callable[[Run], list[float]]]] = [
        ("validation loss, nats", "log", lambda run: run.val_loss),
        ("validation accuracy", "linear", lambda run: run.val_acc),
    ]
    for position, (label, scale, values) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), position, yscale=scale)
        for arm, runs, color in zip(ARMS, (plain, majority), ("tab:blue", "tab:orange"), strict=True):
            curves = [values(run) for run in runs]
            epochs = range(1, len(curves[0]) + 1)
            for curve in curves:
                axes.plot(epochs, curve, color=color, linewidth=0.5, alpha=0.4)
            mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
            axes.plot(epochs, mean, color=color, linewidth=2, label=arm)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _counts(plain: int, majority: int) -> tuple[str, str, str]:
    return f"{plain:,}", f"{majority:,}", f"x {majority / plain:.2f}"


def _compare(
    plain: Sequence[Run], majority: Sequence[Run], value: Callable[[Run], float], digits: int
) -> tuple[str, str, str]:
    reference, measured = [value(run) for run in plain], [value(run) for run in majority]
    difference = paired_difference(measured, reference)
    return (
        _show(estimate(reference), digits),
        _show(estimate(measured), digits),
        _show(difference, digits, sign="+"),
    )


def _show(value: Estimate, digits: int, sign: str = "") -> str:
    return f"{value.mean:{sign}.{digits}f} ± {value.half_width:.{digits}f}"


def _receipt(runs: Sequence[Run]) -> str:
    differences = [run.output_difference for run in runs if run.output_difference is not None]
    return f"{max(differences):.1e}" if differences else "not measured"


def _judge(difference: Estimate, *, larger_is_better: bool) -> str:
    if not difference.excludes_zero:
        return "no difference shown (the interval contains 0)"
    better = (difference.mean > 0) == larger_is_better
    return f"Majority Kernels {'better' if better else 'worse'}"
