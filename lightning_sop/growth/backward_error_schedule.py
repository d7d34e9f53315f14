"""Growing when it pays: the schedule that tries growth out on copies, within a part of the run's FLOPs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_sop.growth.advisor import Trial
from lightning_sop.growth.evidence import Evidence, Laboratory
from lightning_sop.growth.schedule import Moment, Schedule

_FEWEST = 8  # batches of a check
_LEAST = 20  # FLOPs, in those of a batch in the small network, without which not even the costs are measured
_SPARE = 3  # checks that one would like to afford besides those that a decision takes


@dataclass(frozen=True)
class _Plan:
    """A check, in FLOPs.

    Attributes:
        batches: of its gradients.
        steps: of its rollout.
        trap: whether the trap test is made.
        check: cost without the rollout.
        confirm: cost of the rollout.
        patience: checks that a decision takes.
        copies: whether growth is copies only, so that every check has a rollout.
    """

    batches: int
    steps: int
    trap: bool
    check: float
    confirm: float
    patience: int
    copies: bool

    @property
    def reserve(self) -> float:
        """What must be left after a check that finds something."""
        return 0.0 if self.copies else (self.patience - 1) * self.check + self.confirm

    @property
    def single(self) -> float:
        """What a check takes at least: with its rollout where that alone decides."""
        return self.check + self.confirm * self.copies


class BackwardErrorSchedule(Schedule):
    """Grow when the next FLOPs lower the loss more in the grown network than in the small one, as measured on copies.

    At a check the growth is made on copies, and both networks' gradients on random training batches are compared. To first
    order a step lowers the loss by h‖g_s‖² in the small network, and by h_⊥‖g_⊥‖² more in the grown one, which costs phi
    times more: growth seems to pay where T = h_⊥U_⊥ - phi h U_s is ``z`` standard errors above zero, U being unbiased
    estimates of these squared norms. After ``patience`` such checks in a row both copies are trained for ``rollout`` steps
    on the same batches, and the network grows if the grown one has lowered the loss on held-out batches more per FLOP, again
    by ``z`` standard errors. Copies of one network (``donors="self"``) have no new direction at first order: for them T says
    nothing, and a longer rollout decides alone.

    Checks never take more than ``cost`` of the run's FLOPs. Where this allows few, they are spread over the run, with
    fewer batches and shorter rollouts if need be (down to 8 batches and a quarter of the steps); a run too short for one
    decision is left alone, with a warning.

    The batches must not be those that the run was just trained on: a step lowers the gradient on its own batch, so their
    U_s is too small and T too large. A run draws them from a second pass over its training data; where it cannot (iterable
    data), it keeps its last ones, with a warning, and the rollout alone can be trusted.

    Args:
        every: least number of optimizer steps between checks.
        batches: of a check.
        z: standard errors that count as more than chance (1.64: one false alarm in 20).
        patience: checks in a row that must find that growth pays.
        min_steps: optimizer steps before the first check; default ``every``. Choose the end of the warm-up.
        rollout: steps of the confirmation.
        duplicate_rollout: the same where growth consists of copies only, which take longer to become different.
        cost: part of the run's FLOPs (planned steps of the small network) that all checks together may take.
        horizon: the rest of the run must be at least this many times as long, in FLOPs, as a check with its rollout.
        new_rate: h_⊥/h, the rate of new directions after growth relative to the old ones'.
    """

    def __init__(
        self,
        every: int = 200,
        batches: int = 32,
        z: float = 1.64,
        patience: int = 2,
        min_steps: int | None = None,
        rollout: int = 20,
        duplicate_rollout: int = 100,
        cost: float = 0.03,
        horizon: float = 5.0,
        new_rate: float = 1.0,
    ) -> None:
        least = {"every": 1, "batches": 4, "patience": 1, "rollout": 1, "duplicate_rollout": 1, "min_steps": 0}
        given = {"every": every, "batches": batches, "patience": patience, "rollout": rollout}
        given |= {"duplicate_rollout": duplicate_rollout, "min_steps": every if min_steps is None else min_steps}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
                raise ValueError(
                    f"BackwardErrorSchedule: {name} must be a whole number, {least[name]} or more, not {value!r}"
                )
        if not 0 < cost <= 1:
            raise ValueError(f"BackwardErrorSchedule: cost must be in (0, 1], not {cost!r}")
        for name, number in (("z", z), ("horizon", horizon), ("new_rate", new_rate)):
            if not 0 <= number < math.inf:
                raise ValueError(f"BackwardErrorSchedule: {name} must be a number, 0 or more, not {number!r}")
        self.every, self.batches, self.z, self.patience = every, batches, z, patience
        self.min_steps: int = given["min_steps"]
        self.rollout, self.duplicate_rollout = rollout, duplicate_rollout
        self.cost, self.horizon, self.new_rate = cost, horizon, new_rate
        self.spent = 0.0
        self._next: int | None = self.min_steps
        self._plan: _Plan | None = None
        self._step_flops = 0.0
        self._streak = 0
        self._grow = False

    def due(self, moment: Moment) -> bool:
        return self._grow

    def wants(self, moment: Moment) -> int:
        if moment.total is None:
            raise ValueError(
                "BackwardErrorSchedule needs to know the length of the run: set max_steps, or max_epochs with data of known "
                "length"
            )
        if self._grow or self._next is None:
            return 0
        return self.batches if moment.step >= self._next else 0

    def consider(self, laboratory: Laboratory, moment: Moment) -> Evidence | None:
        if not self.wants(moment) or self._too_late(moment, laboratory.batches_per_step):
            return None
        assert moment.total is not None  # wants() has asked for it
        if self._plan is None and self.cost * moment.total * laboratory.batches_per_step < _LEAST:
            self._never(moment)
            return None
        trial = Trial(laboratory)
        try:
            return self._tried(trial, moment)
        finally:
            self.spent += trial.flops

    def _tried(self, trial: Trial, moment: Moment) -> Evidence | None:
        assert moment.total is not None
        self._step_flops = trial.small_flops * trial.laboratory.batches_per_step
        budget = self.cost * moment.total * self._step_flops
        first = self._plan is None
        if self.spent + trial.flops + trial.guessed_flops() <= budget:
            trial.measure_grown()
            self._plan = self._plan or self._planned(trial, budget)
        if self._plan is None or not trial.grown_flops:
            self._never(moment)
            return None
        if self._too_late(moment, trial.laboratory.batches_per_step):
            return None
        if first:
            self._pace(moment, self._plan, budget - self.spent - trial.flops)
            if self._next is not None and self._next > moment.step + self.every:
                return None  # checks are spread over the run: until the next, only the costs are known
        return self._check(trial, moment, self._plan, budget)

    def _never(self, moment: Moment) -> None:
        self._next = None
        warnings.warn(
            f"BackwardErrorSchedule: cost={self.cost} of {moment.total} steps allows no decision, so the network does not "
            "grow. Raise cost, lower batches or the rollout's steps, or choose another schedule.",
            stacklevel=4,
        )

    def _check(self, trial: Trial, moment: Moment, plan: _Plan, budget: float) -> Evidence:
        evidence = trial.first_order(plan.batches, self.new_rate)
        if plan.trap:
            evidence = replace(evidence, trap=trial.trap())
        found = evidence.duplication or self.z * evidence.se < evidence.T
        self._streak = self._streak + 1 if found else 0
        enough = found and self._streak >= plan.patience
        if enough and self.spent + trial.flops + trial.rollout_flops(plan.steps) <= budget:
            evidence = self._confirmed(trial, evidence, plan.steps)
            self._streak = plan.patience - 1  # if not, the next check may ask again
        self._grow = evidence.grow
        self._pace(moment, plan, budget - self.spent - trial.flops, hurry=found and not enough)
        return replace(evidence, flops=trial.flops)

    def _confirmed(self, trial: Trial, evidence: Evidence, steps: int) -> Evidence:
        small, grown = trial.rollout(steps)
        advantage = grown / (1 + evidence.phi) - small
        error = float(advantage.std() / len(advantage) ** 0.5) if len(advantage) > 1 else 0.0
        ours, theirs = float(grown.mean()), float(small.mean())
        if theirs > 0:
            gain = ours / (1 + evidence.phi) / theirs
        else:
            gain = math.inf if ours > 0 else math.nan if math.isnan(ours + theirs) else 0.0
        return replace(
            evidence,
            gain=gain,
            small_decrease=theirs,
            grown_decrease=ours,
            advantage=float(advantage.mean()),
            advantage_se=error,
            steps=steps,
            grow=gain > 1 and self.z * error < float(advantage.mean()),
        )

    def _planned(self, trial: Trial, budget: float) -> _Plan | None:
        """The largest check that the budget allows a decision with, and some more if possible."""
        copies = trial.duplication
        longest, most = (self.duplicate_rollout, min(_FEWEST, self.batches)) if copies else (self.rollout, self.batches)
        patience = 1 if copies else self.patience
        for steps in dict.fromkeys(max(1, longest // part) for part in (1, 2, 4)):
            for spare in (_SPARE, 0):
                for batches in dict.fromkeys(max(min(_FEWEST, most), most // part) for part in (1, 2, 4, 8)):
                    gradients = batches * (trial.small_flops + trial.grown_flops) + trial.statistics_flops(batches)
                    confirm = trial.rollout_flops(steps)
                    trap = trial.growth.probe is not None and trial.trap_flops() <= (gradients + confirm * copies) / 2
                    check = trial.small_flops + trial.build_flops + gradients + trap * trial.trap_flops()
                    plan = _Plan(batches, steps, trap, check, confirm, patience, copies)
                    if trial.flops + (1 + spare) * plan.single + plan.reserve <= budget - self.spent:
                        return plan
        return None

    def _pace(self, moment: Moment, plan: _Plan, left: float, *, hurry: bool = False) -> None:
        """Set when the next check is: so that the checks that can be afforded are spread over the run."""
        assert moment.total is not None
        checks = int((left - plan.reserve) // plan.single) if not hurry else 1
        end = moment.total - self.horizon * (plan.check + plan.confirm) / self._step_flops
        if checks < 1:
            self._next = None
        else:
            interval = 0 if hurry else math.ceil((end - moment.step) / (checks + 1))
            self._next = moment.step + max(self.every, interval)

    def _too_late(self, moment: Moment, batches_per_step: int) -> bool:
        """Whether the rest of the run is too short; then it is from now on."""
        assert moment.total is not None
        steps = moment.total - moment.step
        if self._plan is None:
            late = steps * batches_per_step < self.horizon * _LEAST
        else:
            late = steps * self._step_flops < self.horizon * (self._plan.check + self._plan.confirm)
        if late:
            self._next = None
        return late

    def state_dict(self) -> dict[str, Any]:
        plan = None if self._plan is None else dict(vars(self._plan))
        names = ("spent", "_next", "_step_flops", "_streak", "_grow")
        return {"plan": plan, **{name.lstrip("_"): getattr(self, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._plan = None if state["plan"] is None else _Plan(**state["plan"])
        self.spent, self._next, self._step_flops = state["spent"], state["next"], state["step_flops"]
        self._streak, self._grow = state["streak"], state["grow"]
