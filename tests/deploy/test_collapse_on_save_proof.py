"""What CollapseOnSave measures, and that measuring disturbs nothing."""

from __future__ import annotations

import pathlib
import threading

import pytest
import torch
from deploy_toys import Kernels, NoForward, Toy, data, fit, names, trainer
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)

from lightning_sop.callbacks.collapse_on_save import CollapseOnSave
from lightning_sop.deploy import CollapseError, verify


def test_a_model_whose_forward_cannot_be_used(tmp_path):
    callbacks = [Kernels(error=0.25), CollapseOnSave(tolerance=9.0), ModelCheckpoint(tmp_path, filename="x")]
    fit(tmp_path, *callbacks, model=NoForward())
    receipt = verify(tmp_path / "x.deploy.ckpt")
    assert [call["module"] for call in receipt["probe"]] == ["net", "head"]
    assert receipt["output_difference"] > 0.01


def test_without_a_forward_the_weights_are_compared(tmp_path):
    run = trainer(tmp_path, Kernels(error=0.25), CollapseOnSave())
    run.strategy.connect(Toy())
    run.validate(Toy(), data(), verbose=False)
    with pytest.raises(CollapseError, match=r"'head\.weight'"):
        run.save_checkpoint(tmp_path / "x.ckpt")
    run = trainer(tmp_path, Kernels(), CollapseOnSave())
    run.validate(Toy(), data(), verbose=False)
    run.save_checkpoint(tmp_path / "x.ckpt")
    receipt = verify(tmp_path / "x.deploy.ckpt")
    assert receipt["output_difference"] is None
    assert "no forward call was recorded" in receipt["note"]


class Uncopyable(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_module_that_cannot_be_copied(tmp_path):
    fit(tmp_path, Kernels(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), model=Uncopyable())
    receipt = verify(tmp_path / "x.deploy.ckpt")
    assert receipt["output_difference"] is None
    assert "cannot be copied (TypeError: cannot pickle" in receipt["note"]


class Picky(Toy):
    """Takes whole batches only."""

    def forward(self, x):
        if len(x) != 8:
            raise ValueError("not a whole batch")
        return super().forward(x)


def test_a_batch_that_cannot_be_cut_is_replayed_whole(tmp_path):
    fit(tmp_path, Kernels(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), model=Picky())
    receipt = verify(tmp_path / "x.deploy.ckpt")
    assert receipt["probe"] == [{"module": "", "shapes": [[8, 4]]}]
    assert (receipt["output_difference"], receipt["note"]) == (0, "")


class Remembers(Toy):
    """Keeps a hidden state, as truncated backpropagation through time does, and draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.hidden = torch.nn.GRUCell(4, 4), None
        self.own = torch.Generator().manual_seed(0)

    def forward(self, x):
        self.hidden = self.cell(x, self.hidden)
        seen, self.hidden = self.hidden, self.hidden.detach()
        return super().forward(seen + torch.randn(x.shape, generator=self.own))


def test_what_a_model_keeps_from_call_to_call_is_no_difference(tmp_path):
    fit(tmp_path, Kernels(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), model=Remembers())
    receipt = verify(tmp_path / "x.deploy.ckpt")
    assert (receipt["output_difference"], receipt["note"]) == (0, "")
    run = trainer(tmp_path, Kernels(error=0.25), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="y"))
    with pytest.raises(CollapseError, match=r"not those that were trained.*in 'head\.weight'"):
        run.fit(Remembers(), data())


class OnAGraph(Toy):
    """Inputs go over the edges of a graph, which is a sparse buffer."""

    def __init__(self, layout=torch.sparse_coo) -> None:
        super().__init__()
        self.register_buffer("edges", torch.eye(4).roll(1, 0).to_sparse(layout=layout))

    def forward(self, x):
        return super().forward((self.edges @ x.T).T)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # torch's own remarks
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers(tmp_path, layout):
    model = OnAGraph(layout)
    fit(tmp_path, Kernels(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), model=model)
    receipt = verify(tmp_path / "x.deploy.ckpt")
    # torch cannot copy a module that has a compressed one
    assert (receipt["output_difference"], "cannot be copied" in receipt["note"]) in [(0, False), (None, True)]
    assert receipt["weight_difference"] == 0
    loaded = OnAGraph.load_from_checkpoint(tmp_path / "x.deploy.ckpt", layout=layout)
    assert torch.equal(loaded.edges.to_dense(), model.edges.to_dense())
    run = trainer(tmp_path, CollapseOnSave("safetensors"), ModelCheckpoint(tmp_path / "other", filename="x"))
    with pytest.raises(CollapseError, match=r"'edges', a tensor of float32 in layout sparse.*format='ckpt'"):
        run.fit(OnAGraph(layout), data())


class NeverTheSame(Toy):
    calls = 0

    def forward(self, x):
        NeverTheSame.calls += 1  # of the class: a copy of the model does not bring it back
        return super().forward(x) + NeverTheSame.calls


def test_outputs_that_are_not_repeatable_are_not_compared(tmp_path):
    fit(tmp_path, Kernels(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), model=NeverTheSame())
    receipt = verify(tmp_path / "x.deploy.ckpt")
    assert receipt["output_difference"] is None
    assert receipt["note"].startswith("outputs are not repeatable")


class Rounds(Toy):
    """A little rounding of its weights makes a large difference."""

    def forward(self, x):
        return super().forward(x) * 0 + self.head.weight.sum() * 1e4 % 1


def test_the_error_says_whether_it_is_the_weights_or_the_outputs(tmp_path):
    run = trainer(tmp_path, CollapseOnSave(dtype="float16"), ModelCheckpoint(tmp_path, filename="x"))
    with pytest.raises(CollapseError, match=r"weights, which are those that were trained up to rounding.*other outputs"):
        run.fit(Rounds(), data())


class Flagged(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flags", torch.ones(4, dtype=torch.bfloat16))


def test_a_buffer_in_low_precision_does_not_loosen_the_proof(tmp_path):
    fit(tmp_path, CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), model=Flagged())
    assert verify(tmp_path / "x.deploy.ckpt")["tolerance"] == 1e-4
    run = trainer(tmp_path, Kernels(error=0.01), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="y"))
    with pytest.raises(CollapseError, match=r"tolerance 0.0001\) in 'head\.weight'"):
        run.fit(Flagged(), data())


class Scripted(NoForward):
    """A part of it is TorchScript, which its step calls directly."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.net = torch.jit.script(self.net)


def test_scripted_parts_are_heard_and_replayed(tmp_path):
    fit(tmp_path, Kernels(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), model=Scripted())
    receipt = verify(tmp_path / "x.deploy.ckpt")
    assert [call["module"] for call in receipt["probe"]] == ["net", "head"]
    assert (receipt["output_difference"], receipt["note"]) == (0, "")


class Labels(torch.nn.Module):
    """Keeps an object of its own class in the state_dict."""

    def get_extra_state(self):
        return self

    def set_extra_state(self, state):
        pass


def test_an_entry_that_is_no_plain_data_is_named(tmp_path):
    class Labeled(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.labels = Labels()

    run = trainer(tmp_path, CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"))
    with pytest.raises(CollapseError, match=r"The file has no 'labels\._extra_state'.*plain data.*get_extra_state\(\)"):
        run.fit(Labeled(), data())


class NeedsItsTrainer(Toy):
    def forward(self, x):
        return super().forward(x) / self.trainer.max_epochs


class Asks(Toy):
    """For more than a deploy file has."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["vocabulary"] = pathlib.PurePosixPath("a")

    def on_load_checkpoint(self, checkpoint):
        self.last_epoch = checkpoint["epoch"]


def test_a_hook_that_asks_for_what_is_not_there_is_told(tmp_path):
    run = trainer(tmp_path, CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"))
    with pytest.raises(
        CollapseError, match=r"on_load_checkpoint\(\) fails with it \(KeyError: 'epoch'\).*left out 'vocabulary'"
    ):
        run.fit(Asks(), data())
    run = trainer(tmp_path, CollapseOnSave(on_mismatch="warn"), ModelCheckpoint(tmp_path, filename="y"), max_epochs=2)
    with pytest.warns(UserWarning, match="on_load_checkpoint"):
        run.fit(Asks(), data())
    assert run.global_step == 6
    assert "y.ckpt" in names(tmp_path) and "y.deploy.ckpt" not in names(tmp_path)


def test_a_call_that_cannot_be_replayed_is_told(tmp_path):
    fit(tmp_path, Kernels(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), model=NeedsItsTrainer())
    assert "forward could not be replayed (RuntimeError: NeedsItsTrainer" in verify(tmp_path / "x.deploy.ckpt")["note"]


class Trains(Toy):
    """Notes everything that saving might disturb."""

    def on_train_batch_end(self, *_):
        self.trace.append(torch.get_rng_state())
        self.trace.append(torch.tensor([m.training for m in self.modules()]))
        self.trace += [value.clone() for value in self.state_dict().values()]
        self.trace += [p.grad.clone() for p in self.parameters() if p.grad is not None]


def test_training_is_bitwise_the_run_without(tmp_path):
    def run(*callbacks):
        torch.manual_seed(3)
        model = Trains()
        model.trace = []
        saves = ModelCheckpoint(tmp_path / str(len(callbacks)), every_n_train_steps=1, save_top_k=-1)
        fit(tmp_path, Kernels(), *callbacks, saves, model=model, max_epochs=2)
        return model.trace

    plain, ours = run(), run(CollapseOnSave())
    assert len(list((tmp_path / "1").glob("*.deploy.ckpt"))) == 6
    assert len(plain) == len(ours)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_unused_layers_are_compared_too(tmp_path):
    class Idle(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.idle = torch.nn.Linear(3, 3)

    class IdleKernels(Kernels):
        def collapsed_weights(self, model=None):
            weights = super().collapsed_weights(model)
            return {**weights, "idle.weight": weights["idle.weight"] + 0.5}

    run = trainer(tmp_path, IdleKernels(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"))
    with pytest.raises(RuntimeError, match=r"in 'idle\.weight'"):
        run.fit(Idle(), data())
