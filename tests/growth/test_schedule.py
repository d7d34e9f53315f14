"""When to grow."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_sop.growth import AtFraction, AtStep, Moment, OnPlateau


def test_at_a_step() -> None:
    assert AtStep(0).due(Moment(0))
    assert [AtStep(3).due(Moment(step)) for step in range(5)] == [False, False, False, True, True]
    assert AtStep(3).state_dict() == {}


@pytest.mark.parametrize("step", [-1, 1.0, "3", True, None])
def test_steps_are_whole_numbers(step: Any) -> None:
    with pytest.raises(ValueError, match="AtStep: step must be a whole number, 0 or more"):
        AtStep(step)


def test_at_a_fraction() -> None:
    assert AtFraction(0).due(Moment(0, 10))
    assert [AtFraction(0.25).due(Moment(step, 10)) for step in range(5)] == [False, False, False, True, True]
    with pytest.raises(ValueError, match="set max_steps, or max_epochs with data of known length"):
        AtFraction(0.25).due(Moment(3))


@pytest.mark.parametrize("fraction", [-0.1, 1, 2.0, float("nan")])
def test_fractions_are_less_than_one(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"AtFraction: fraction must be in \[0, 1\)"):
        AtFraction(fraction)


def dues(schedule: OnPlateau, values: list[float], name: str = "val_loss") -> list[bool]:
    result = []
    for step, value in enumerate(values):
        schedule.observe(Moment(step, metrics={name: value}))
        result.append(schedule.due(Moment(step)))
    return result


def test_a_plateau() -> None:
    assert dues(OnPlateau(patience=2), [3, 2, 2, 1, 1, 1]) == [False, False, False, False, False, True]
    assert dues(OnPlateau("acc", "max", patience=1), [0.1, 0.2, 0.2], "acc") == [False, False, True]
    assert dues(OnPlateau(patience=1, min_delta=0.5), [3, 2.6, 2.4]) == [False, True, False]
    assert dues(OnPlateau(patience=1, min_steps=3), [1, 1, 1, 1]) == [False, False, False, True]


def test_a_plateau_of_what_is_not_a_number() -> None:
    """A loss that is NaN has not improved."""
    assert dues(OnPlateau(patience=2), [1, float("nan"), float("nan")]) == [False, False, True]


def test_the_state_of_a_plateau() -> None:
    one, two = OnPlateau(patience=3), OnPlateau(patience=3)
    dues(one, [1, 1, 1])
    two.load_state_dict(one.state_dict())
    assert dues(one, [1]) == dues(two, [1]) == [True]


@pytest.mark.parametrize(
    ("options", "match"),
    [({"mode": "low"}, "mode must be 'min' or 'max'"), ({"patience": 0}, "patience must be at least 1")],
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"OnPlateau: {match}"):
        OnPlateau(**options)


def test_a_metric_that_is_missing() -> None:
    with pytest.raises(ValueError, match="OnPlateau: 'val_loss' was not logged; there are acc, loss"):
        OnPlateau().observe(Moment(1, metrics={"loss": 1.0, "acc": 0.5}))
