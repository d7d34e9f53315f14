"""DeepFusionGrow: a run that becomes a larger network in mid-training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_sop.callbacks._carry_over import matched_factors, remembered, restart
from lightning_sop.callbacks._growing import SELF, Donor, become, calls_of_step, fits, load_donor, wider
from lightning_sop.callbacks._growing_run import moment_of, refuse_unsupported, report
from lightning_sop.callbacks._plain_copy import plain_copy
from lightning_sop.callbacks._probe import ProbeRecorder
from lightning_sop.deploy.replay import Call
from lightning_sop.growth import Fusion, FusionError, fuse
from lightning_sop.growth.check import check_shapes
from lightning_sop.growth.moments import MapState, grow_optimizer_state
from lightning_sop.growth.optimizers import plain_name, replace_parameters
from lightning_sop.growth.rates import StepRates
from lightning_sop.growth.schedule import AtStep, Schedule

FORMAT = 1


def growing(trainer: Trainer) -> list[DeepFusionGrow]:
    """The growth events of a run, in their order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, DeepFusionGrow)]  # type: ignore[attr-defined]


def take_shape(module: nn.Module, state_dict: Mapping[str, Any], *_: Any) -> None:
    """Before weights are loaded: give the module the shape that they have, if the run's growth events lead there."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None or fits(module, state_dict):
        return
    assert isinstance(module, LightningModule)
    changes: dict[str, Any] = {}
    for event in growing(trainer):
        changes |= event.grown
        grown = wider(module, event.grown if event.target else changes, event.target)
        if fits(grown, state_dict):
            successors = become(module, grown, {} if event.target else changes)
            for other in growing(trainer):
                other.successors = successors
            return


class DeepFusionGrow(Callback):
    """Fuse trained networks into a larger one in mid-run, and go on (Deep Fusion, arXiv 2306.11903).

    At a moment that the schedule chooses, between two optimizer steps, the LightningModule gets the tensors of its own
    class built with the ``grown`` hyper-parameters: the donors' weights side by side, so that it computes the average of
    what they computed. Module, optimizers, schedulers and gradient scaler stay the same objects; what the optimizers
    remember is carried over. Checkpoints from before and after resume; those from after hold the grown hyper-parameters.

    Args:
        donors: ``"self"`` for copies of the network that is being trained, or a list of checkpoints of the same class, of
            any widths, among which ``"self"`` may be, too.
        grown: changed hyper-parameters by name, for example ``{"width": 512, "heads": 8}``; or with ``target`` the new
            module of that attribute, ``{"class_path": …, "init_args": {…}}``.
        schedule: when; default before the first step.
        copies: how many copies of the network ``donors="self"`` stands for.
        target: the attribute of the LightningModule that grows, where the class cannot be built from hyper-parameters.
        weights: λ, what each donor's output counts in the average; default equal for different networks, unequal for copies
            of one, which would stay equal for ever otherwise.
        off_diagonal: standard deviation of noise between donors, relative to their weights; 0 keeps the average exact.
        chunks: by pattern of a layer's path: the number of equal parts of its outputs, where several quantities lie in one
            matrix and the probe does not find out.
        learning_rate: how to go on. ``"match"``: each tensor's rate is multiplied such that the loss falls as fast as
            before; ``"keep"``: the rates of the optimizer; ``"restart"``: the schedulers begin anew at their peak; a number
            multiplies all rates.
        optimizer_state: maps the state of an optimizer whose kind is unknown (:mod:`lightning_sop.growth.moments`).
        tolerance: largest gap to the average, relative to the largest output, where theory says that there is none.
        seed: of the noise.
        name: tells two callbacks with the same ``grown`` apart in checkpoints.
        verbose: print what was fused when it happens.

    Raises:
        FusionError: at the start of fit, for donors that are missing, unreadable, of another architecture or of widths
            that do not add up; at growth, where the fused network is not what it should be.
        MisconfigurationException: at the start of fit, under a strategy or beside a callback that cannot follow.
    """

    def __init__(
        self,
        donors: str | list[str] = SELF,
        grown: dict[str, Any] | None = None,
        schedule: Schedule | None = None,
        *,
        copies: int = 2,
        target: str | None = None,
        weights: list[float] | None = None,
        off_diagonal: float = 0.0,
        chunks: dict[str, int] | None = None,
        learning_rate: Literal["match", "keep", "restart"] | float = "match",
        optimizer_state: MapState | None = None,
        tolerance: float = 1e-5,
        seed: int = 0,
        name: str | None = None,
        verbose: bool = True,
    ) -> None:
        if not grown:
            raise ValueError("DeepFusionGrow: say what the grown network is, for example grown={'width': 512, 'heads': 8}")
        if isinstance(donors, str) and donors != SELF:
            donors = [donors]
        names = [SELF] * copies if donors == SELF else list(donors)
        if not 2 <= len(names) <= 8:
            raise ValueError(f"DeepFusionGrow: 2 to 8 donors can be fused, not {len(names)}")
        if isinstance(learning_rate, str) and learning_rate not in ("match", "keep", "restart"):
            raise ValueError(
                f"DeepFusionGrow: learning_rate must be match, keep, restart or a number, not {learning_rate!r}"
            )
        self.donors = names
        self.grown = dict(grown)
        self.schedule = AtStep(0) if schedule is None else schedule
        self.target = target
        self.weights = weights
        self.off_diagonal = off_diagonal
        self.chunks = chunks
        self.learning_rate = learning_rate
        self.optimizer_state = optimizer_state
        self.tolerance = tolerance
        self.seed = seed
        self.name = name
        self.verbose = verbose
        self.fusion: Fusion | None = None
        self.grown_at: int | None = None
        self._factors: dict[str, float] = {}
        self._rates: list[StepRates] = []
        self._loaded: list[Donor] = []
        self._boundary = True
        self._recorder: ProbeRecorder | None = None
        self._reshape: RemovableHandle | None = None
        self.successors: dict[nn.Parameter, nn.Parameter] = {}  # of a network that took its shape from loaded weights

    @property
    def state_key(self) -> str:
        """Tells apart the growth events of a run, by what they grow to."""
        return f"{type(self).__qualname__}[{self.name}]" if self.name else self._generate_state_key(grown=self.grown)

    # ------------------------------------------------------------------ before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked, and be ready for the weights of a network that has grown already."""
        if growing(trainer)[0] is self:
            self._reshape = pl_module.register_load_state_dict_pre_hook(take_shape)  # type: ignore[no-untyped-call]
        if stage != "fit":
            return
        refuse_unsupported(trainer)
        if self.grown_at is None:
            self._loaded = [load_donor(name, pl_module) for name in dict.fromkeys(self.donors) if name != SELF]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Widths and names are compared before anything runs, whenever the growth is due."""
        for optimizer in trainer.optimizers:  # made before the weights were loaded, perhaps
            replace_parameters(optimizer, self.successors, {})
        self.successors = {}
        if self.grown_at is None and self._next_in_line(trainer):  # later ones start from what this one makes
            check_shapes(*self._networks(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The learning rates of a network that has grown before this run was resumed."""
        self._boundary = True
        self._set_rates(trainer, pl_module)

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Grow, where an optimizer step is complete and the schedule says so."""
        if self.grown_at is not None or not self._boundary or not self._next_in_line(trainer):
            return
        if self.schedule.due(moment_of(trainer, {})):
            calls = calls_of_step(pl_module, batch, batch_idx) or self._recorded()
            if calls:
                self._grow(trainer, pl_module, calls, batch, batch_idx)
            else:  # the step needs its Trainer: listen to this one, and grow after it
                self._recorder = ProbeRecorder()
                self._recorder.attach(pl_module)
                self._recorder.open()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Whether gradients are being accumulated."""
        self._boundary = not trainer.fit_loop._should_accumulate()
        if self._recorder is not None:
            self._recorder.close()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """New metrics for the schedule."""
        if not trainer.sanity_checking and self.grown_at is None:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.schedule.observe(moment_of(trainer, metrics))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The optimizer's own groups, also after a step that raised."""
        for rates in self._rates:
            rates.join()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind on the optimizers."""
        for rates in self._rates:
            rates.remove()
        self._rates, self._loaded = [], []
        if self._reshape is not None:
            self._reshape.remove()
            self._reshape = None

    def _next_in_line(self, trainer: Trainer) -> bool:
        """Events happen in the order of the callbacks."""
        events = growing(trainer)
        return all(event.grown_at is not None for event in events[: events.index(self)])

    def _recorded(self) -> list[Call]:
        if self._recorder is None:
            return []
        self._recorder.detach()
        if not self._recorder.calls:
            raise FusionError(f"no call of a network was seen in training_step to probe with. {self._recorder.missed}")
        return self._recorder.calls

    # ------------------------------------------------------------------ growth

    def _networks(self, pl_module: LightningModule) -> tuple[list[LightningModule], LightningModule]:
        """Donors in order, and an unfused grown network; plain ones, which share nothing with the live module."""
        here = plain_copy(pl_module)
        modules: dict[str, LightningModule] = {SELF: here}
        for donor in self._loaded:
            assert donor.module is not None
            modules[donor.name] = donor.module.to(here.device)
        return [modules[name] for name in self.donors], wider(pl_module, self.grown, self.target).to(here.device)

    def _grow(self, trainer: Trainer, pl_module: LightningModule, calls: list[Call], batch: Any, index: int) -> None:
        donors, grown = self._networks(pl_module)
        fusion = fuse(
            donors,
            grown,
            calls,
            weights=self.weights,
            off_diagonal=self.off_diagonal,
            chunks=self.chunks,
            tolerance=self.tolerance,
            seed=self.seed,
        )
        names = {parameter: plain_name(name) for name, parameter in pl_module.named_parameters()}
        sources = [name for n, name in enumerate(self.donors) if name not in self.donors[:n]]
        states = [remembered(trainer.optimizers, self._donor(name), names) for name in sources]
        if self.learning_rate == "match":
            self._factors = matched_factors(trainer, fusion, donors, grown, batch, index)
        successors = become(pl_module, grown, {} if self.target else self.grown)
        live = {plain_name(name): parameter for name, parameter in pl_module.named_parameters()}
        for number, optimizer in enumerate(trainer.optimizers):
            carried = (self.optimizer_state or grow_optimizer_state)(
                fusion.op, optimizer, [state[number] for state in states], live
            )
            replace_parameters(optimizer, successors, {live[name]: entry for name, entry in carried.items()}, restart=True)
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()
        self.fusion, self.grown_at = fusion, trainer.global_step
        self._continue_at(trainer, pl_module)
        report(trainer, fusion, self.donors if self.verbose else [])

    def _donor(self, name: str) -> Donor:
        return next((donor for donor in self._loaded if donor.name == name), Donor(SELF))

    def _continue_at(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.learning_rate == "restart":
            for config in trainer.lr_scheduler_configs:
                restart(config.scheduler)
        elif isinstance(self.learning_rate, (int, float)):
            self._factors = {plain_name(name): float(self.learning_rate) for name, _ in pl_module.named_parameters()}
        self._set_rates(trainer, pl_module)

    def _set_rates(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for rates in self._rates:
            rates.remove()
        factors = {
            p: self._factors[plain_name(n)] for n, p in pl_module.named_parameters() if plain_name(n) in self._factors
        }
        self._rates = [StepRates(optimizer, factors) for optimizer in trainer.optimizers] if factors else []

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Whether and when it has grown, the rates since, and what the schedule has seen; plain data."""
        return {
            "format": FORMAT,
            "grown_at": self.grown_at,
            "factors": dict(self._factors),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue; the module has its shape and weights already."""
        if state_dict.get("format") != FORMAT:
            raise ValueError(f"DeepFusionGrow: the checkpoint's state has format {state_dict.get('format')}, not {FORMAT}")
        self.grown_at = state_dict["grown_at"]
        self._factors = dict(state_dict["factors"])
        self.schedule.load_state_dict(state_dict["schedule"])
