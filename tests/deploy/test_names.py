from __future__ import annotations

from pathlib import Path

import pytest

from lightning_sop.deploy import deploy_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("run/x.ckpt", "run/x.deploy.ckpt"),
        ("x.pth", "x.deploy.ckpt"),
        ("x", "x.deploy.ckpt"),
        ("epoch=0-val=0.25", "epoch=0-val=0.25.deploy.ckpt"),
        ("epoch=0-val=0.25.ckpt", "epoch=0-val=0.25.deploy.ckpt"),
        ("run.v2", "run.v2.deploy.ckpt"),
        ("some.folder/x", "some.folder/x.deploy.ckpt"),
        (".hidden", ".hidden.deploy.ckpt"),
        ("memory://a/x.ckpt", "memory://a/x.deploy.ckpt"),
        (Path("a") / "x.ckpt", str(Path("a") / "x.deploy.ckpt")),
    ],
)
def test_suffix_is_replaced_and_numbers_are_kept(path, expected):
    assert deploy_path(path) == expected


def test_safetensors():
    assert deploy_path("x.ckpt", "safetensors") == "x.deploy.safetensors"


def test_unknown_format():
    with pytest.raises(ValueError, match=r"'onnx' is unknown.*'ckpt', 'safetensors'"):
        deploy_path("x", "onnx")
