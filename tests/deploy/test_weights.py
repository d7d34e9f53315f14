from __future__ import annotations

import io

import pytest
import torch
from deploy_toys import Tied, Toy
from torch import nn

from lightning_sop.deploy.weights import (
    coarsest_dtype,
    distinct,
    equal_names,
    export_dtype,
    export_state,
    plain_name,
    sha256,
    shared_names,
)


def saved_bytes(state) -> int:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getbuffer().nbytes


def test_names_of_compiled_parts_are_plain():
    model = Toy()
    model.net = torch.compile(model.net)
    exported = export_state(model.state_dict())
    assert list(exported) == list(Toy().state_dict())
    assert plain_name("a._orig_mod.b_orig_mod.c") == "a.b_orig_mod.c"


def test_ties_that_were_lost_in_the_state_dict_share_memory_again():
    model = Tied()
    untied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported = export_state(untied, ties=shared_names(model))
    assert exported["again.weight"].data_ptr() == exported["net.2.weight"].data_ptr()
    assert saved_bytes(exported) <= saved_bytes(model.state_dict()) < saved_bytes(untied)


def test_names_that_are_tied_but_differ_stay_apart():
    model = Tied()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["again.weight"] += 1
    exported = export_state(state, ties=shared_names(model))
    assert torch.equal(exported["again.weight"], exported["net.2.weight"] + 1)


def test_ties_are_found_without_a_module():
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    assert equal_names(state) == [["net.2.weight", "again.weight"]]


def test_a_view_does_not_bring_its_buffer_along():
    buffer = torch.randn(1000, 4)
    exported = export_state({"weight": buffer[3:5].t()})
    assert torch.equal(exported["weight"], buffer[3:5].t())
    assert exported["weight"].is_contiguous()
    assert exported["weight"].untyped_storage().nbytes() == 2 * 4 * 4


def test_only_floating_tensors_are_cast():
    state = {"a": torch.randn(3), "n": torch.tensor(7), "z": torch.zeros(2, dtype=torch.complex64)}
    exported = export_state(state, dtype=torch.bfloat16)
    assert [exported[name].dtype for name in "anz"] == [torch.bfloat16, torch.int64, torch.complex64]
    assert coarsest_dtype(exported) is torch.bfloat16
    assert coarsest_dtype({"n": state["n"]}) is torch.float32


def test_hash_knows_names_shapes_dtypes_and_bytes_and_nothing_else():
    a, b = torch.randn(2, 3), torch.arange(4)
    state = {"a": a, "b": b}
    same = {"b": b.clone(), "a": a.t().contiguous().t()}
    assert sha256(state) == sha256(same)
    others = [{"a": a, "c": b}, {"a": a.view(3, 2), "b": b}, {"a": a, "b": b.int()}, {"a": a + 1e-6, "b": b}]
    assert len({sha256(other) for other in [state, *others]}) == 5
    assert sha256({"scalar": torch.tensor(1.0), "flag": torch.tensor(True), "half": torch.ones(2).bfloat16()})


def test_distinct_counts_shared_memory_once():
    weight = nn.Linear(3, 3).weight.detach()
    assert len(distinct({"a": weight, "b": weight, "c": weight.clone(), "d": 1})) == 2


def test_unknown_dtype():
    assert export_dtype(None) is None
    with pytest.raises(ValueError, match=r"'int8' is unknown.*'bfloat16', 'float16', 'float32'"):
        export_dtype("int8")
