"""Which parameters are trained in a larger form, and why the others are not: a plan, made before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_sop.reparam.base import Method, Site
from lightning_sop.reparam.form import TrainingForm
from lightning_sop.reparam.memory import overlapping
from lightning_sop.reparam.names import child_name, matches, split
from lightning_sop.reparam.tied import TiedForm

if TYPE_CHECKING:
    from rich.table import Table

#: Layer types whose weights are converted unless something else is asked for. Subclasses count; ``Conv1D`` is transformers'.
DEFAULT_LAYERS: tuple[str, ...] = (
    "Linear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Bilinear",
    "MultiheadAttention",
    "RNNBase",
    "RNNCellBase",
    "Conv1D",
)
#: Layers whose weight has its output units on axis 1.
_OUTPUT_ON_AXIS_1 = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Conv1D")


@dataclass
class Rule:
    """One method for a part of the model.

    Args:
        method: how the matching weights are trained; None leaves them plain.
        include: shell-style patterns of names (``*`` also matches dots) that the rule is for; None means all. A pattern is
            compared with the parameter's name, its layer's and those of all modules around it, so ``"encoder"`` stands for
            everything in ``encoder``, and ``"*.head"`` also for a ``head`` of the model itself.
        exclude: patterns of names that the rule is not for.
        layers: layer types by class name, base classes included; None means :data:`DEFAULT_LAYERS`.
    """

    method: Method | None
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, value in (("include", self.include), ("exclude", self.exclude), ("layers", self.layers)):
            if isinstance(value, str):
                raise ValueError(f"{name} takes a list of strings, not the single string {value!r}: write [{value!r}]")


@dataclass(frozen=True)
class PlanRow:
    """What becomes of one parameter tensor.

    Attributes:
        names: all names that the model has for it, the one that is converted first.
        layer: class name of its layer.
        site: where it sits.
        method: how it is trained; None leaves it plain.
        reason: why it stays plain, or a remark.
    """

    names: tuple[str, ...]
    layer: str
    site: Site
    method: Method | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """The name under which it is converted."""
        return self.names[0]

    @property
    def owner(self) -> tuple[str, str]:
        """Path of its layer and its name there."""
        return split(self.name)

    @property
    def aliases(self) -> list[tuple[str, str]]:
        """The same for the other layers that share it."""
        return [split(name) for name in self.names[1:]]

    @cached_property
    def numel(self) -> int:
        """Number of values in the plain model."""
        count = 1
        for size in self.site.shape:
            count *= size
        return count

    @cached_property
    def trained_numel(self) -> int:
        """Number of values while training."""
        return self.numel if self.method is None else self.method.expanded_numel(self.site)


@dataclass(frozen=True)
class Plan:
    """What becomes of every parameter of a model; print it with rich for a dry run.

    Attributes:
        rows: one for each parameter tensor.
    """

    rows: tuple[PlanRow, ...]
    _by_name: dict[str, PlanRow] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {row.name: row for row in self.rows})

    @property
    def converted(self) -> list[tuple[PlanRow, Method]]:
        """The rows that are trained in a larger form, with their methods."""
        return [(row, row.method) for row in self.rows if row.method is not None]

    def row(self, name: str) -> PlanRow:
        """The row of a parameter by the name under which it is listed."""
        return self._by_name[name]

    @property
    def numel(self) -> tuple[int, int]:
        """Number of parameters in the plain model, and while training."""
        return sum(row.numel for row in self.rows), sum(row.trained_numel for row in self.rows)

    def __rich__(self) -> Table:
        from lightning_sop.reparam.table import plan_table

        return plan_table(self)


def make_plan(model: nn.Module, rules: Sequence[Rule]) -> Plan:
    """Decide for every parameter; the first rule that matches it has its way. Nothing is changed.

    Args:
        model: any module.
        rules: methods with the parts of the model that they are for.

    Raises:
        ValueError: a pattern matches nothing in the model, nothing at all is converted, or a weight has a training form
            already; the message names the pattern or the layer, and the way out.
    """
    shared = _shared_parameters(model)
    tangled = overlapping((names[0], parameter) for parameter, names in shared)
    rows = tuple(_decide(model, parameter, names, rules, tangled.get(id(parameter))) for parameter, names in shared)
    _check_patterns(model, rules, [name for _, names in shared for name in names])
    plan = Plan(rows)
    if not plan.converted:
        reasons = "\n".join(f"  {row.name} ({row.layer}): {row.reason}" for row in rows[:20]) or "  (it has no parameters)"
        raise ValueError(f"no weight of {type(model).__name__} is converted.\n{reasons}")
    return plan


def _shared_parameters(model: nn.Module) -> list[tuple[nn.Parameter, tuple[str, ...]]]:
    """Every parameter once, with all its names."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    # A module that appears twice gives a parameter several names that lead to one and the same layer: kept, for state_dicts.
    return [(parameter, tuple(names)) for parameter, names in found.values()]


def _decide(
    model: nn.Module, parameter: nn.Parameter, names: tuple[str, ...], rules: Sequence[Rule], tangled: str | None
) -> PlanRow:
    """The row of one parameter: converted by the first rule that takes any of its names."""
    reasons = []
    for name in names:
        path, local = split(name)
        layer = model.get_submodule(path)
        site = _site(layer, name, parameter)
        obstacle = f"in one memory with '{tangled}'" if tangled else _obstacle(layer, local, parameter)
        for rule in rules:
            refusal = _refusal(rule, names, layer, local, parameter)
            if refusal is None and rule.method is None:
                return _row(layer, names, site, parameter, reason="a rule leaves it plain")
            reason = refusal or obstacle or (rule.method.unsuitable(parameter, site) if rule.method else None)
            if reason is None:
                if _live_form(layer._modules.get(child_name(local))):
                    raise ValueError(
                        f"'{name}' is in a training form already: two SimulatedOverparam callbacks (or calls of expand_) "
                        "select it. Give them include or exclude patterns that do not overlap."
                    )
                remark = "" if parameter.requires_grad else "frozen: begins when an optimizer holds it"
                ordered = (name, *(other for other in names if other != name))
                return _row(layer, ordered, site, parameter, rule.method, remark)
            reasons.append(reason)
            if refusal is None:
                break
    path, _ = split(names[0])
    layer = model.get_submodule(path)
    return _row(layer, names, _site(layer, names[0], parameter), parameter, reason=_most_telling(reasons))


def _row(
    layer: nn.Module,
    names: tuple[str, ...],
    site: Site,
    parameter: nn.Parameter,
    method: Method | None = None,
    reason: str = "",
) -> PlanRow:
    return PlanRow(names, type(layer).__name__, site, method, reason)


def _site(layer: nn.Module, name: str, parameter: nn.Parameter) -> Site:
    shape = () if isinstance(parameter, UninitializedParameter) else tuple(parameter.shape)
    return Site(name, shape, out_axis=1 if _is_a(layer, _OUTPUT_ON_AXIS_1) and len(shape) > 1 else 0)


def _refusal(rule: Rule, names: Sequence[str], layer: nn.Module, local: str, parameter: nn.Parameter) -> str | None:
    """Why a rule does not take a parameter, or None. An exclusion of any of a shared tensor's names excludes it."""
    for pattern in rule.exclude:
        if any(matches(pattern, name) for name in names):
            return f"excluded by '{pattern}'"
    if rule.include is not None and not any(matches(pattern, name) for pattern in rule.include for name in names):
        return "not included"
    if not _is_a(layer, DEFAULT_LAYERS if rule.layers is None else rule.layers):
        return f"layer type {type(layer).__name__} is not asked for"
    if rule.layers is None and not (local.startswith("weight") or local.endswith("_weight")):
        return "not a weight of its layer type"
    return None


def _obstacle(layer: nn.Module, local: str, parameter: nn.Parameter) -> str | None:
    """Why no method can be applied to a parameter, or None."""
    if isinstance(parameter, UninitializedParameter):
        return "uninitialized (lazy layer): run a forward before training to give it a shape"
    if f"{local.removesuffix('_orig')}_mask" in layer._buffers and local.endswith("_orig"):
        return "pruned: the weight is computed from it"
    if local.endswith(("_g", "_v")) and isinstance(getattr(layer, local[:-2], None), Tensor):
        return "weight_norm: the weight is computed from it"
    if local.endswith("_orig") and isinstance(getattr(layer, local.removesuffix("_orig"), None), Tensor):
        return "spectral_norm: the weight is computed from it"
    if parameter.dim() < 2:
        return f"{parameter.dim()}-dimensional"
    if not parameter.is_floating_point():
        return f"dtype {parameter.dtype}"
    if parameter.is_meta:
        return "on the meta device"
    if getattr(layer, "sparse", False):
        return "has sparse gradients"
    return None


def _live_form(child: nn.Module | None) -> bool:
    """Whether a weight is being trained in a larger form; a copied module has forms that are not live."""
    form = child.form if isinstance(child, TiedForm) else child
    return isinstance(form, TrainingForm) and form.live


def _most_telling(reasons: Sequence[str]) -> str:
    """Of the reasons for each rule and name, the one that a reader wants: an exclusion, then an obstacle, then the type."""
    order = (
        "excluded",
        "uninitialized",
        "pruned",
        "weight_norm",
        "spectral_norm",
        "not a weight",
        "layer type",
        "not included",
    )
    ranked = sorted(reasons, key=lambda r: next((i for i, start in enumerate(order) if r.startswith(start)), 1))
    return ranked[0]


def _is_a(layer: nn.Module, types: Sequence[str]) -> bool:
    """Whether a layer is of one of these types, by class name, base classes included."""
    return any(base.__name__ in types for base in type(layer).__mro__)


def _check_patterns(model: nn.Module, rules: Sequence[Rule], names: Sequence[str]) -> None:
    for rule in rules:
        for layer in rule.layers or ():
            if not any(_is_a(module, [layer]) for module in model.modules()):
                present = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
                raise ValueError(f"the layer type '{layer}' matches no layer. The model has: {present}")
        for kind, patterns in (("include", rule.include or ()), ("exclude", rule.exclude)):
            for pattern in patterns:
                if not any(matches(pattern, name) for name in names):
                    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
                    raise ValueError(f"the {kind} pattern '{pattern}' matches no parameter. The model has: {shown}")
