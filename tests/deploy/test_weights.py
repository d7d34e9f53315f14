from __future__ import annotations

import io

import pytest
import torch
from deploy_toys import Tied, Toy
from torch import nn

from lightning_sop.deploy.errors import CollapseError
from lightning_sop.deploy.replay import Difference
from lightning_sop.deploy.tolerance import Tolerance, compare_weights
from lightning_sop.deploy.weights import (
    coarsest_dtype,
    distinct,
    equal_names,
    export_dtype,
    export_state,
    plain_name,
    sha256,
    shared_names,
    size,
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


SPECIAL = {
    "coo": lambda: torch.eye(4).to_sparse(),
    "not coalesced": lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2)),
    "empty": lambda: torch.sparse_coo_tensor(size=(3, 3)),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "by channel": lambda: torch.quantize_per_channel(torch.ones(4, 2), torch.ones(4), torch.zeros(4).int(), 0, torch.quint8),
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "double complex": lambda: torch.ones(3, dtype=torch.complex128),
}


def against(tensor, state) -> Difference:
    return compare_weights({"a": tensor}, state, Tolerance(None, {"a": tensor}, state))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own remarks on these kinds
@pytest.mark.parametrize("kind", list(SPECIAL))
def test_tensors_that_are_not_simply_numbers(kind):
    tensor = SPECIAL[kind]()
    exported = export_state({"a": tensor, "b": tensor.detach()})
    file = io.BytesIO()
    torch.save(exported, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert (loaded["a"].layout, loaded["a"].dtype, loaded["a"].shape) == (tensor.layout, tensor.dtype, tensor.shape)
    assert sha256(exported) == sha256(loaded) == sha256({"a": tensor, "b": tensor})
    assert against(tensor, loaded).absolute == 0
    assert sha256(exported) != sha256({"a": torch.ones(tensor.shape), "b": torch.ones(tensor.shape)})
    assert len(distinct(exported)) == 1 or not tensor._nnz()
    assert size(exported)[1] > 0 or not tensor._nnz()


def test_sparse_tensors_are_cast_and_compared_by_values_and_places():
    tensor = torch.eye(4).to_sparse() / 3
    cast = export_state({"a": tensor}, dtype=torch.bfloat16)
    assert cast["a"].dtype is torch.bfloat16
    assert 0 < against(tensor, cast).relative < 0.01
    assert against(tensor, {"a": torch.eye(4).flip(0).to_sparse() / 3}).relative == float("inf")
    assert against(tensor, {"a": tensor.to_dense()}).relative == float("inf")


def test_a_conjugate_is_not_the_tensor_that_it_shares_memory_with():
    tensor = torch.ones(3, dtype=torch.complex64) * 1j
    exported = export_state({"a": tensor, "b": tensor.conj()})
    assert torch.equal(exported["b"], -exported["a"])


def test_a_tensor_that_cannot_be_copied_is_named():
    with pytest.raises(CollapseError, match=r"'a' of the state_dict cannot be copied.*persistent=False"):
        export_state({"a": torch.ones(3, device="meta")})


def test_distinct_counts_shared_memory_once():
    weight = nn.Linear(3, 3).weight.detach()
    assert len(distinct({"a": weight, "b": weight, "c": weight.clone(), "d": 1})) == 2


def test_unknown_dtype():
    assert export_dtype(None) is None
    with pytest.raises(ValueError, match=r"'int8' is unknown.*'bfloat16', 'float16', 'float32'"):
        export_dtype("int8")


def test_each_weight_has_the_tolerance_of_its_own_dtype():
    trained = {"a": torch.ones(3), "flags": torch.ones(3).bfloat16(), "half": torch.ones(3).half()}
    tolerance = Tolerance(None, trained, parameters=["a"])
    assert (tolerance.of("a"), tolerance.of("half"), tolerance.of("flags"), tolerance.outputs) == (1e-4, 2e-2, 1e-1, 1e-4)
    off = {"a": trained["a"] * 1.001, "flags": trained["flags"] * 1.05, "half": trained["half"]}
    worst = compare_weights(trained, off, tolerance)
    assert worst.name == "a" and worst.exceeds(tolerance.of("a"))
    assert compare_weights(trained, {**off, "a": trained["a"]}, tolerance).name == "flags"


def test_the_coarser_of_the_trained_and_the_deployed_weight_counts():
    half, single = {"a": torch.ones(3).bfloat16()}, {"a": torch.ones(3)}
    assert Tolerance(None, half, single).of("a") == Tolerance(None, single, half).outputs == 1e-1
    assert Tolerance(0.0, half, single).of("a") == Tolerance(0.0, half).outputs == 0
