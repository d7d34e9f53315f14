"""The demo at a tiny budget, and its statistics against scipy's."""

import dataclasses
import logging

import pytest
from rich.console import Console
from scipy import stats

from lightning_sop.zoo.demo.__main__ import main
from lightning_sop.zoo.demo.experiment import Run, Setting
from lightning_sop.zoo.demo.intervals import estimate, paired_difference
from lightning_sop.zoo.demo.report import make_table, verdict

RUN = Run(100, 50, 1000, 1e-7, 0.5, 0.9, [1.0, 0.5], [0.8, 0.9])


@pytest.fixture(autouse=True)
def lightning_log_level():
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


def runs(accuracies, losses):
    pairs = zip(accuracies, losses, strict=True)
    return [dataclasses.replace(RUN, test_acc=accuracy, test_loss=loss) for accuracy, loss in pairs]


def test_the_demo_ends_with_its_table_and_its_figure(tmp_path, capsys):
    assert main(["--seeds=2", "--epochs=1", "--width=16", "--blocks=2", f"--output={tmp_path}"]) == 0
    output = capsys.readouterr().out
    for row in ("parameters, training", "deploy file, bytes", "test accuracy", "test loss", "time of a step", "receipt"):
        assert row in output
    plain, hidden = 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10, 64 * 16 + 16 * 16 + 16 * 10
    assert f"{plain:,}" in output
    assert f"{plain + 3 * hidden:,}" in output
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--seeds=1", "--epochs=0", "--factor=x"])
def test_impossible_options_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main([option])
    assert stop.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_intervals_are_those_of_scipy():
    values, reference = [0.93, 0.95, 0.91, 0.96], [0.92, 0.95, 0.93, 0.91]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    measured = estimate(values)
    assert (measured.mean - measured.half_width, measured.mean + measured.half_width) == pytest.approx((low, high))
    low, high = stats.ttest_rel(values, reference).confidence_interval(0.95)
    difference = paired_difference(values, reference)
    assert (difference.mean - difference.half_width, difference.mean + difference.half_width) == pytest.approx((low, high))


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 values, not 1"):
        estimate([0.5])


def test_the_verdict_says_what_the_intervals_say():
    plain = runs([0.90, 0.91, 0.92], [0.30, 0.31, 0.32])
    same = verdict(plain, runs([0.91, 0.90, 0.92], [0.31, 0.30, 0.32]))
    assert same.count("no difference shown") == 2
    better = verdict(plain, runs([0.95, 0.96, 0.97], [0.20, 0.21, 0.22]))
    assert better.count("Majority Kernels better") == 2
    worse = verdict(plain, runs([0.85, 0.86, 0.87], [0.40, 0.41, 0.42]))
    assert worse.count("Majority Kernels worse") == 2


def test_a_receipt_that_measured_nothing_says_so(capsys):
    unmeasured = [dataclasses.replace(run, output_difference=None) for run in runs([0.9, 0.91], [0.3, 0.31])]
    Console(width=120).print(make_table(Setting(), unmeasured, unmeasured, 1.5))
    assert capsys.readouterr().out.count("not measured") == 2
