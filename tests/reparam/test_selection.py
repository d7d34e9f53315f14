"""Which parameters are converted: patterns, layer types, rules, and the errors for those that select nothing."""

from __future__ import annotations

import io
from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from lightning_sop import MajorityKernels, expand_
from lightning_sop.reparam import Rule, make_plan

METHOD = MajorityKernels(2)


def network() -> nn.Module:
    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Linear(4, 5)),
            "embed": nn.Embedding(5, 4),
            "decoder": nn.ModuleDict({"rnn": nn.GRU(4, 3), "head": nn.Linear(3, 2)}),
            "head": nn.Linear(4, 5, bias=False),
        }
    )
    model["head"].weight = model["embed"].weight
    return model


WEIGHTS = {
    "encoder.0.weight",
    "encoder.2.weight",
    "decoder.rnn.weight_ih_l0",
    "decoder.rnn.weight_hh_l0",
    "decoder.head.weight",
    "head.weight",
}


def selected(**rule) -> set[str]:
    return {row.name for row, _ in make_plan(network(), [Rule(METHOD, **rule)]).converted}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, WEIGHTS),
        ({"include": ["encoder"]}, {"encoder.0.weight", "encoder.2.weight"}),
        ({"include": ["*.head"]}, {"decoder.head.weight", "head.weight"}),
        ({"include": ["head"]}, {"head.weight"}),
        ({"exclude": ["*.head"]}, WEIGHTS - {"decoder.head.weight", "head.weight"}),
        ({"exclude": ["embed"]}, WEIGHTS - {"head.weight"}),  # any name of a shared tensor excludes it
        ({"include": ["*.weight_hh*"]}, {"decoder.rnn.weight_hh_l0"}),
        ({"include": ["encoder.[02]"], "exclude": ["encoder.0.weight"]}, {"encoder.2.weight"}),
        ({"layers": ["Linear"]}, {"encoder.2.weight", "decoder.head.weight", "head.weight"}),
        ({"layers": ["RNNBase"], "include": ["decoder"]}, {"decoder.rnn.weight_ih_l0", "decoder.rnn.weight_hh_l0"}),
        ({"layers": ["Embedding"]}, {"embed.weight"}),
    ],
)
def test_patterns_and_layer_types(rule: dict, expected: set[str]) -> None:
    assert selected(**rule) == expected


def test_the_first_rule_that_matches_has_its_way() -> None:
    other = MajorityKernels(5)
    rules = [Rule(None, include=["decoder.head"]), Rule(other, include=["decoder"]), Rule(METHOD)]
    methods = {row.name: row.method for row in make_plan(network(), rules).rows}
    assert methods["decoder.head.weight"] is None
    assert methods["decoder.rnn.weight_ih_l0"] is methods["decoder.rnn.weight_hh_l0"] is other
    assert methods["encoder.0.weight"] is METHOD
    model = network()
    engine = expand_(model, torch.optim.SGD(model.parameters(), lr=0.1), rules=rules)
    assert {len(form.phi) for form in engine.forms.values()} == {2, 5}


@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error_that_names_it(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"{kind} pattern 'decodr' matches no parameter.*encoder\.0\.weight"):
        make_plan(network(), [Rule(METHOD, **{kind: ["decodr"]})])


def test_nothing_converted_is_an_error_with_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"(?s)no weight of ModuleDict is converted.*encoder\.0\.weight.*excluded by '\*'"):
        make_plan(network(), [Rule(METHOD, exclude=["*"])])
    with pytest.raises(ValueError, match="it has no parameters"):
        make_plan(nn.ReLU(), [Rule(METHOD)])
    with pytest.raises(ValueError, match="1-dimensional|not a weight|layer type"):
        make_plan(nn.LayerNorm(3), [Rule(METHOD)])


@pytest.mark.parametrize("name", ["include", "exclude", "layers"])
def test_a_single_string_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} takes a list"):
        Rule(METHOD, **{name: "encoder"})


def test_overlapping_selections_are_refused_and_separate_ones_work() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expand_(model, optimizer, METHOD, include=["encoder", "head"])
    with pytest.raises(ValueError, match=r"'encoder\.0\.weight' is in a training form already"):
        expand_(model, optimizer, METHOD)
    with pytest.raises(ValueError, match="in a training form already"):
        expand_(model, optimizer, METHOD, layers=["Embedding"], include=["embed"])  # tied to the head
    assert len(expand_(model, optimizer, MajorityKernels(3), include=["decoder"]).forms) == 3


def test_rules_and_the_single_arguments_exclude_each_other() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="either rules, or method"):
        expand_(model, optimizer, METHOD, rules=[Rule(METHOD)])
    with pytest.raises(ValueError, match="rules is empty"):
        expand_(model, optimizer, rules=[])


def test_the_table_says_what_becomes_of_every_parameter() -> None:
    plan = make_plan(network(), [Rule(MajorityKernels(3), exclude=["encoder.0"])])
    console = Console(file=io.StringIO(), width=200)
    console.print(plan)
    text = console.file.getvalue()
    assert all(name in text for name in (*WEIGHTS, "encoder.1.weight", "decoder.rnn.bias_ih_l0", "embed.weight"))
    assert "excluded by 'encoder.0'" in text
    converted = 20 + 9 * 4 + 9 * 3 + 6 + 20
    plain = (6 + 3) + 6 + 5 + 2 * 9 + 2
    assert plan.numel == (plain + converted, plain + 3 * converted)


NAMES = sorted(name for name, _ in network().named_parameters(remove_duplicate=False))
PIECES = st.sampled_from(["*", "?", ".", "encoder", "decoder", "head", "weight", "embed", "rnn", "0", "2", "[0-2]", "_l0"])
PATTERNS = st.one_of(st.sampled_from(NAMES), st.lists(PIECES, min_size=1, max_size=4).map("".join))


def named_by(pattern: str, name: str) -> bool:
    """Whether a pattern stands for a parameter, its layer, or a module around it."""
    parts = name.split(".")
    prefixes = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatchcase(text, pattern) for prefix in prefixes for text in (prefix, f".{prefix}"))


@settings(deadline=None, max_examples=150)
@given(include=st.none() | st.lists(PATTERNS, min_size=1, max_size=2), exclude=st.lists(PATTERNS, max_size=2))
def test_any_patterns_select_what_they_name_and_never_change_the_state_dict(
    include: list[str] | None, exclude: list[str]
) -> None:
    model = network()
    before = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"head.weight": ("embed.weight", "head.weight")}
    expected = {
        weight
        for weight in WEIGHTS
        for aliases in [names.get(weight, (weight,))]
        if include is None or any(named_by(pattern, name) for pattern in include for name in aliases)
        if not any(named_by(pattern, name) for pattern in exclude for name in aliases)
    }
    every_pattern_names_something = all(
        any(named_by(pattern, name) for name in NAMES) for pattern in (*(include or ()), *exclude)
    )
    if expected and every_pattern_names_something:
        engine = expand_(model, optimizer, METHOD, include=include, exclude=exclude)
        assert set(engine.forms) == expected
    else:
        with pytest.raises(ValueError, match=r"matches no parameter|no weight of"):
            expand_(model, optimizer, METHOD, include=include, exclude=exclude)
        assert not any("form" in name for name, _ in model.named_modules())
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} == before


# ---------------------------------------------------------------------- one memory, and names that are taken


def tied_by_memory(transposed: bool) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4))
    weight = model[0].weight.data
    model[2].weight.data = weight.t() if transposed else weight
    return model


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_in_one_memory_stay_plain(transposed: bool) -> None:
    plan = make_plan(tied_by_memory(transposed), [Rule(METHOD)])
    assert [row.name for row, _ in plan.converted] == ["1.weight"]
    assert plan.row("0.weight").reason == "in one memory with '2.weight'"
    assert plan.row("2.weight").reason == "in one memory with '0.weight'"

    trained = []
    for factor in (0, 1):
        torch.manual_seed(0)
        model = tied_by_memory(transposed)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if factor:
            expand_(model, optimizer, MajorityKernels(factor), seed=3)
        for _ in range(3):
            optimizer.zero_grad()
            model[2](model[0](torch.ones(2, 4))).square().sum().backward()
            optimizer.step()
        trained.append(model[0].weight.detach())
    assert torch.equal(*trained)


def test_parts_of_one_buffer_are_weights_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    buffer = torch.randn(12 + 15)
    model[0].weight.data, model[1].weight.data = buffer[:12].view(3, 4), buffer[12:].view(5, 3)
    assert {row.name for row, _ in make_plan(model, [Rule(METHOD)]).converted} == {"0.weight", "1.weight"}


@pytest.mark.parametrize("kind", ["attribute", "module", "class"])
def test_a_layer_with_something_of_the_forms_name_is_refused_by_name(kind: str) -> None:
    class Own(nn.Linear):
        weight_form = 3

    layer = Own(4, 3) if kind == "class" else nn.Linear(4, 3)
    if kind == "attribute":
        layer.weight_form = "dense"
    elif kind == "module":
        layer.weight_form = nn.Identity()
    model = nn.Sequential(nn.Linear(4, 4), layer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"the layer of '1.weight', an? (Own|Linear), has something called 'weight_form'"):
        expand_(model, optimizer, METHOD)
    assert not model[0]._modules  # nothing is left half-way
    expand_(model, optimizer, METHOD, exclude=["1"])


def test_a_layer_that_answers_for_every_name_is_converted() -> None:
    class Anything(nn.Linear):
        def __getattr__(self, name: str) -> object:
            return None if name.endswith("_form") else super().__getattr__(name)

    model = nn.Sequential(Anything(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = expand_(model, optimizer, METHOD)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert engine.forms["0.weight"].mixed


def test_the_default_device_is_not_that_of_random_numbers() -> None:
    weights = []
    for device in (None, "meta"):  # as "cuda" would, it refuses a generator of the CPU
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.set_default_device(device)
        try:
            for method in (MajorityKernels(3), MajorityKernels(3, draw="dirichlet"), MajorityKernels(3, draw="one_hot")):
                engine = expand_(model, optimizer, method, seed=1)
                weights.append(engine.forms["0.weight"].storage[0].clone())
                engine.detach()
            MajorityKernels(3, draw="softmax_normal").draw([engine.forms["0.weight"].site], torch.Generator("cpu"), 0.0)
            assert make_plan(model, [Rule(METHOD)]).numel[1] > 12
        finally:
            torch.set_default_device(None)
    for left, right in zip(weights[:3], weights[3:], strict=True):
        assert torch.equal(left, right)
