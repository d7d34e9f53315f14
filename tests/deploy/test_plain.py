from __future__ import annotations

import argparse
import enum
import io
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sop.deploy.plain import keep_plain, to_plain


class Colour(str, enum.Enum):
    RED = "red"


NOT_PLAIN = [Colour.RED, Path("x"), torch.nn.ReLU, torch.nn.ReLU(), np.zeros(2), argparse.Namespace(a=1), object(), len]


@pytest.mark.parametrize("value", NOT_PLAIN, ids=lambda value: type(value).__name__)
def test_a_value_of_a_class_is_omitted_as_a_whole(value):
    assert keep_plain({"a": {"deep": [1, value]}, "b": 2}, "ckpt") == ({"b": 2}, ["a"])


def test_mappings_and_numpy_numbers_become_builtins():
    plain = to_plain(OrderedDict(a=np.float32(0.5), b=OrderedDict(c=(np.int64(3), torch.float16))))
    assert plain == {"a": 0.5, "b": {"c": (3, torch.float16)}}
    assert type(plain) is dict
    assert type(plain["b"]["c"][0]) is int


def test_tensors_are_copied_and_parameters_lose_their_graph():
    parameter = torch.nn.Parameter(torch.ones(2))
    copy = to_plain(parameter)
    assert type(copy) is torch.Tensor
    assert not copy.requires_grad
    assert copy.data_ptr() != parameter.data_ptr()


def test_safetensors_carries_what_json_does():
    kept, omitted = keep_plain({"a": (1, 2), "b": torch.ones(1), "c": torch.float16, "d": None}, "safetensors")
    assert (kept, omitted) == ({"a": [1, 2], "d": None}, ["b", "c"])


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
nested = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3))


@given(nested)
def test_plain_data_survives_a_file_that_loads_weights_only(value):
    buffer = io.BytesIO()
    torch.save(to_plain(value), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == value
