"""The rows of the table for growth and cost."""

from __future__ import annotations

from typing import Any

from lightning_sop.dynamics.quantity import Quantity

_PAY = "this package: docs/methods/backward_error.md, whether growth pays"
_RATES = "this package: docs/methods/backward_error.md, rates after growth"
_TRAP = "this package: docs/methods/backward_error.md, the trap"
_FUSION = "Deep Fusion, arXiv 2306.11903"
_GROWS, _CHECKS, _COUNTS = "DeepFusionGrow", "BackwardErrorSchedule", "TrainingCost"


def _row(logged_by: str, name: str, unit: str, description: str, source: str = "this package", **more: Any) -> Quantity:
    return Quantity(name, unit, "scalar", description, source, logged_by=logged_by, **more)


_EVENTS = (
    _row("DynamicsMonitor", "growth/event", "1", "How many times the network has grown, logged when it does."),
    _row(
        "DynamicsMonitor",
        "growth/donor_loss",
        "loss",
        "Loss of a donor on the batch of the growth, without dropout and with norms over the batch.",
        _FUSION,
        per="donor",
        total="mean",
    ),
    _row(
        "DynamicsMonitor",
        "growth/fused_loss",
        "loss",
        "Loss of the grown network on the batch of the growth, without dropout and with norms over the batch.",
        _FUSION,
    ),
    _row(
        _GROWS,
        "growth/gap",
        "1",
        "Largest difference of the grown network's outputs to its donors' average, relative to the largest output.",
        _FUSION,
    ),
    _row(_GROWS, "growth/parameters", "values", "Size of the grown network."),
)

_SCORES = (
    _row(_CHECKS, "growth/nu", "1", "Speed of the directions that growth adds, relative to the small network's.", _PAY),
    _row(_CHECKS, "growth/phi", "1", "FLOPs of a batch, grown over small, less 1.", _PAY),
    _row(_CHECKS, "growth/T", "loss/step", "First-order gain of the next steps by growing, its cost included.", _PAY),
    _row(_CHECKS, "growth/se", "loss/step", "Jackknife standard error of T.", _PAY),
    _row(_CHECKS, "growth/U_s", "loss/step/rate", "Unbiased ‖E g‖² of the small network, in the optimizer's metric.", _PAY),
    _row(_CHECKS, "growth/U_b", "loss/step/rate", "Unbiased ‖E g‖² of the grown network, in the optimizer's metric.", _PAY),
    _row(
        _CHECKS,
        "growth/U_perp",
        "loss/step/rate",
        "Unbiased ‖E g‖² of the directions that growth adds, in the optimizer's metric.",
        _PAY,
    ),
    _row(_CHECKS, "growth/B_s", "loss/step/rate", "Mean ‖g‖² of a batch, small network, in the optimizer's metric.", _PAY),
    _row(_CHECKS, "growth/B_b", "loss/step/rate", "Mean ‖g‖² of a batch, grown network, in the optimizer's metric.", _PAY),
    _row(_CHECKS, "growth/trap", "1", "1 - R²: part of the grown network's move that the small ones cannot make.", _TRAP),
    _row(_CHECKS, "growth/gain", "1", "Decrease of the loss per FLOP on copies, grown over small.", _PAY),
    _row(_CHECKS, "growth/small_decrease", "loss", "Decrease of the loss of the small network on copies.", _PAY),
    _row(_CHECKS, "growth/grown_decrease", "loss", "Decrease of the loss of the grown network on copies.", _PAY),
    _row(_CHECKS, "growth/advantage", "loss", "Decrease at equal cost, grown less small.", _PAY),
    _row(_CHECKS, "growth/advantage_se", "loss", "Standard error of the advantage.", _PAY),
    _row(_CHECKS, "growth/rate", "rate", "Learning rate h before growth, mean over tensors.", _RATES),
    _row(_CHECKS, "growth/new_rate", "rate", "Learning rate of the directions that growth adds.", _RATES),
    _row(_CHECKS, "growth/speed_rate", "rate", "The one rate that keeps the speed of learning, h U_s/U_b.", _RATES),
    _row(_CHECKS, "growth/igr_rate", "rate", "The one rate that keeps implicit regularization, h B_s/B_b.", _RATES),
    _row(_CHECKS, "growth/batches", "batches", "Batches that the gradients of a check were of.", _PAY),
    _row(_CHECKS, "growth/steps", "steps", "Steps on copies; 0 where none were taken.", _PAY),
    _row(_CHECKS, "growth/small_flops", "FLOPs", "Forward and backward of one batch, small network.", _PAY),
    _row(_CHECKS, "growth/grown_flops", "FLOPs", "Forward and backward of one batch, grown network.", _PAY),
    _row(_CHECKS, "growth/flops", "FLOPs", "What the check has taken.", _PAY),
    _row(_CHECKS, "growth/duplication", "1", "1 if the growth is copies and nothing else.", _TRAP),
    _row(_CHECKS, "growth/grow", "1", "The decision: 1 to grow, 0 to go on.", _PAY),
)

_SPENDERS = {
    "small": "training before the first growth",
    "grown": "training from the first growth on",
    "checks": "the schedule's checks",
    "growth": "the growth itself",
    "donors": "the training of the donors",
}
COST = (
    _row(_COUNTS, "cost/flops", "FLOPs", "Forward and backward of all training batches so far, over all ranks."),
    _row(_COUNTS, "cost/seconds", "s", "Wall time of training so far, without validation."),
    _row(_COUNTS, "cost/batches", "batches", "Batches trained on so far."),
)
_SPENT = (
    *(_row(_COUNTS, f"growth/flops_{part}", "FLOPs", f"Spent on {what}.") for part, what in _SPENDERS.items()),
    *(_row(_COUNTS, f"growth/seconds_{part}", "s", f"Wall time of {what}.") for part, what in _SPENDERS.items()),
    _row(_COUNTS, "growth/flops_donors_estimated", "1", "1 if the donors' FLOPs are estimated in part."),
    _row(
        _COUNTS,
        "growth/flops_saved",
        "FLOPs",
        "What all batches would have cost in the network that is there now, less what was spent.",
    ),
    _row(
        _COUNTS,
        "growth/flops_saved_with_donors",
        "FLOPs",
        "What all batches would have cost in the network that is there now, less what was spent, donors' training included.",
    ),
)

GROWTH = (*_EVENTS, *_SCORES, *_SPENT)
