"""DeepFusionGrow: a run that becomes a larger network in mid-training."""

from __future__ import annotations

import copy
import weakref
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_sop.callbacks._carry_over import Beginning, step_rates
from lightning_sop.callbacks._growing import SELF, Donor
from lightning_sop.callbacks._growing_options import check_options
from lightning_sop.callbacks._growing_run import calls_of_step, metrics_of, moment_of, refuse_unsupported, report, shared
from lightning_sop.callbacks._growing_shape import growing, take_shape
from lightning_sop.callbacks._growing_step import Observer, check_ahead, observed, prepare
from lightning_sop.callbacks._growth_costs import bring_costs, check, counted
from lightning_sop.callbacks._laboratory import RunLaboratory
from lightning_sop.callbacks._plain_copy import plain_copy
from lightning_sop.callbacks._probe import ProbeRecorder
from lightning_sop.callbacks._terminal import LateBar
from lightning_sop.deploy.replay import Call
from lightning_sop.growth import Fusion, FusionError
from lightning_sop.growth.moments import MapState
from lightning_sop.growth.optimizers import enlist, plain_name, replace_parameters
from lightning_sop.growth.rates import StepRates
from lightning_sop.growth.schedule import AtStep, Schedule
from lightning_sop.growth.warm_up import Opening, WarmUp

FORMAT = 1


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
        schedule: when, counted in ``trainer.global_step``; default before the first step. Where ``training_step`` needs its
            Trainer before it calls the network, one step more is taken, for a probe.
        copies: how many copies of the network ``donors="self"`` stands for.
        target: the attribute of the LightningModule that grows, where the class cannot be built from hyper-parameters.
        weights: λ, what each donor's output counts in the average; default equal for different networks, unequal for copies
            of one, which would stay equal for ever otherwise.
        off_diagonal: standard deviation of noise between donors, relative to their weights; 0 keeps the average exact.
        chunks: by pattern of a layer's path: the number of equal parts of its outputs, where several quantities lie in one
            matrix and the probe does not find out.
        widen: what units beyond the donors' are: ``"new"`` ones, each a ``"copy"``, or new ones that ``"gradmax"`` chooses
            by the gradient of the current batch; None refuses them.
        norm: norms over units of different donors stay ``"joint"``, with a measured gap, or become ``"grouped"``: exact,
            and part of the architecture (:mod:`lightning_sop.growth.norms`).
        learning_rate: how to go on. ``"match"``: each tensor's rate is multiplied such that the loss falls as fast as
            before; ``"keep"``: the rates of the optimizer; ``"restart"``: the schedulers begin anew; a number multiplies all
            rates. Weights decay as fast as before in any case. The multipliers hold inside ``optimizer.step()`` only: the
            optimizer's groups show the schedulers' rates.
        warm_up: after how many optimizer steps the directions that growth adds learn at their full rate. Before, only what
            the donors could do goes on, and the rest is opened linearly, from 0 in the first step; 0 opens it at once.
        optimizer_state: maps the state of an optimizer whose kind is unknown (:mod:`lightning_sop.growth.moments`).
        tolerance: largest gap to the average, relative to the largest output, where theory says that there is none.
        seed: of the noise and of gradmax.
        name: tells two callbacks with the same ``grown`` apart in checkpoints.
        verbose: print what was fused when it happens; default on a terminal or in a notebook.

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
        widen: Literal["new", "copy", "gradmax"] | None = None,
        norm: Literal["joint", "grouped"] = "joint",
        learning_rate: Literal["match", "keep", "restart"] | float = "match",
        warm_up: int = 0,
        optimizer_state: MapState | None = None,
        tolerance: float = 1e-5,
        seed: int = 0,
        name: str | None = None,
        verbose: bool | None = None,
    ) -> None:
        if isinstance(donors, str) and donors != SELF:
            donors = [donors]
        self.donors = [SELF] * copies if donors == SELF else list(donors)
        self.grown = dict(grown or {})
        self.schedule = AtStep(0) if schedule is None else schedule
        self.target = target
        self.weights = weights
        self.off_diagonal = off_diagonal
        self.chunks = chunks
        self.widen = widen
        self.norm = norm
        self.learning_rate = learning_rate
        self.warm_up = warm_up
        self.optimizer_state = optimizer_state
        self.tolerance = tolerance
        self.seed = seed
        self.name = name
        self.verbose = verbose
        check_options(self)
        self.laboratory = RunLaboratory(self)
        self.fusion: Fusion | None = None
        self.grown_at: int | None = None
        self.observers: list[Observer] = []
        self.successors: dict[nn.Parameter, nn.Parameter] = {}  # of a network that took its shape from loaded weights
        self.added: set[str] = set()  # names of parameters that it got then
        self._factors: dict[str, float] = {}
        self._warming: WarmUp | None = None
        self._unused = copy.deepcopy(self.schedule.state_dict())
        self._network: weakref.ref[LightningModule] | None = None
        self._forget()

    def _forget(self) -> None:
        """What lasts for one call of fit."""
        self._rates: list[StepRates | Opening] = []  # of the run's first event, for all of them
        self.loaded: dict[str, Donor] = {}
        self._beginnings: list[Beginning] = []
        self._boundary, self._steps = True, -1
        self._recorder: ProbeRecorder | None = None
        self._reshape: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickled ones begin a run of their own.
        empty: dict[str, Any] = {"_rates": [], "loaded": {}, "_beginnings": [], "observers": [], "successors": {}}
        return {**self.__dict__, **empty, **dict.fromkeys(("_recorder", "_reshape", "_network"))}

    @property
    def options(self) -> dict[str, Any]:
        """How :func:`~lightning_sop.growth.fuse` is to be called."""
        names = ("weights", "off_diagonal", "chunks", "widen", "norm", "tolerance", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def state_key(self) -> str:
        """Tells apart the growth events of a run, by what they grow to."""
        return f"{type(self).__qualname__}[{self.name}]" if self.name else self._generate_state_key(grown=self.grown)

    # ------------------------------------------------------------------ before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the run, and be ready for the weights of a network that has grown already."""
        self._leave()
        bring_costs(trainer)
        if growing(trainer)[0] is self:
            self._reshape = pl_module.register_load_state_dict_pre_hook(take_shape)  # type: ignore[no-untyped-call]
        if stage != "fit":
            return
        refuse_unsupported(trainer)
        if self._network is not None and self._network() is not pl_module:  # another network, which has not grown
            self.grown_at, self.fusion, self._factors, self._warming = None, None, {}, None
            self.schedule.load_state_dict(copy.deepcopy(self._unused))
        self._network = weakref.ref(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Files, names and widths of all growth to come are checked before anything runs."""
        for optimizer in trainer.optimizers:  # made before the weights were loaded, perhaps
            replace_parameters(optimizer, self.successors, {})
        enlist(trainer.optimizers, {plain_name(name): p for name, p in pl_module.named_parameters()}, self.added)
        self.successors, self.added = {}, set()
        if self.learning_rate == "restart":
            self._beginnings = [Beginning.of(config.scheduler) for config in trainer.lr_scheduler_configs]
        if self.grown_at is None and self._next_in_line(trainer):
            network = plain_copy(pl_module)
            with LateBar(trainer, "Growth: donors are read and compared", at_once=True):
                for event in growing(trainer)[growing(trainer).index(self) :]:
                    network = check_ahead(event, network, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The learning rates of a network that has grown before this run was resumed."""
        self._boundary, self._steps = True, trainer.global_step
        if growing(trainer)[0] is self:
            self._set_rates(trainer, pl_module)

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Grow, where an optimizer step is complete and the schedule says so."""
        if self.grown_at is not None or not self._boundary or not self._next_in_line(trainer):
            return
        check(self, trainer, pl_module, batch, batch_idx)
        if self.schedule.due(moment_of(trainer, {})):
            calls = shared(trainer, calls_of_step(trainer, pl_module, batch, batch_idx))
            if calls:
                self._grow(trainer, pl_module, calls, batch, batch_idx)
            else:  # the step needs its Trainer: listen to this one, and grow after it
                self._recorder = ProbeRecorder()
                self._recorder.attach(pl_module)
                self._recorder.open()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Whether gradients are being accumulated; what the schedule looks at."""
        self.laboratory.after_batch(batch, batch_idx)
        for rates in self._rates:
            rates.join()  # after a step that raised, if the module has gone on
        stepped = pl_module.automatic_optimization or trainer.global_step != self._steps
        self._boundary, self._steps = stepped and not trainer.fit_loop._should_accumulate(), trainer.global_step
        if self._recorder is not None:
            self._recorder.close()
            if self._boundary:
                recorder, self._recorder = self._recorder, None
                recorder.detach()
                calls = shared(trainer, recorder.calls)
                if not calls:
                    raise FusionError(f"no call of a network was seen in training_step to probe with. {recorder.missed}")
                self._grow(trainer, pl_module, calls, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """New metrics for the schedule."""
        if not trainer.sanity_checking and self.grown_at is None:
            self.schedule.observe(moment_of(trainer, metrics_of(trainer)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """New metrics for the schedule, where nothing is validated."""
        if not trainer.enable_validation and self.grown_at is None:
            self.schedule.observe(moment_of(trainer, metrics_of(trainer)))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind, also after a step that raised; no teardown follows."""
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind on module and optimizers."""
        self._leave()

    def _leave(self) -> None:
        self.laboratory.close()
        for rates in self._rates:
            rates.remove()
        if self._recorder is not None:
            self._recorder.detach()
        if self._reshape is not None:
            self._reshape.remove()
        self.successors, self.added = {}, set()
        self._forget()

    def _next_in_line(self, trainer: Trainer) -> bool:
        """Events happen in the order of the callbacks."""
        events = growing(trainer)
        return all(event.grown_at is not None for event in events[: events.index(self)])

    # ------------------------------------------------------------------ growth

    @observed
    @counted
    def _grow(self, trainer: Trainer, pl_module: LightningModule, calls: list[Call], batch: Any, index: int) -> None:
        with LateBar(trainer, "Growth: fusing", at_once=True):
            growth = prepare(self, trainer, calls, batch, index)  # on copies: all that may fail
        growth.happen(trainer)
        for beginning in self._beginnings:
            beginning.restore()
        self.fusion, self.grown_at, self._factors, self.loaded = growth.fusion, trainer.global_step, growth.factors, {}
        self._warming = growth.warm_up
        growing(trainer)[0]._set_rates(trainer, pl_module)
        report(trainer, growth.fusion, self.donors, self.verbose)

    def _set_rates(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for rates in self._rates:
            rates.remove()
        self._rates = step_rates(trainer.optimizers, pl_module, growing(trainer))

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Whether and when it has grown, the rates since, and what the schedule has seen; plain data."""
        return {
            "format": FORMAT,
            "grown_at": self.grown_at,
            "factors": dict(self._factors),
            "warm_up": self._warming and self._warming.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue; the module has its shape and weights already."""
        if state_dict.get("format") != FORMAT:
            raise ValueError(f"DeepFusionGrow: the checkpoint's state has format {state_dict.get('format')}, not {FORMAT}")
        self.grown_at = state_dict["grown_at"]
        self._factors = dict(state_dict["factors"])
        self._warming = WarmUp.load(state_dict.get("warm_up"))
        self.schedule.load_state_dict(state_dict["schedule"])
