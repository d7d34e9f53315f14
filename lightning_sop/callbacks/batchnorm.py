"""BatchNorm statistics for the collapsed weights, from inputs of recent training forwards."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_sop.callbacks.outermost import OutermostCalls
from lightning_sop.deploy.replay import Call, isolated_random_state, map_tensors
from lightning_sop.reparam.form import TrainingForm


class BatchNormReestimation:
    """Running statistics as ``torch.optim.swa_utils.update_bn`` would make them, without a pass over the data loader.

    While training, running means and variances are collected under mixed weights; the network that is evaluated has the
    collapsed ones. Copies of the inputs with which the last ``batches`` training steps called the networks are kept and run
    through them again with the collapsed weights in place: the BatchNorm layers collect, everything else is in evaluation
    mode. Layers that did not collect in training stay as they are. Of several processes each uses its own inputs.

    A network that is given another one's outputs by the step is run on those of training, which mixed weights have made.

    Args:
        batches: how many training batches to keep and use; 0 switches everything off.
    """

    def __init__(self, batches: int) -> None:
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
            raise ValueError(f"reestimate_batchnorm is a number of training batches, 0 or more, not {batches!r}")
        self.batches = batches
        self._norms: dict[str, list[_BatchNorm]] = {}  # by path of each module that has any
        self._watched: OutermostCalls | None = None
        self._forget()

    def _forget(self) -> None:
        self._steps: deque[list[Call]] = deque(maxlen=self.batches)
        self._collecting: dict[_BatchNorm, None] = {}  # a set with an order
        self._fresh = self._paused = self._unseen = False

    def attach(self, root: nn.Module) -> None:
        """Begin to keep inputs, where there is a BatchNorm layer at all."""
        self.detach()
        if not self.batches:
            return
        for path, module in root.named_modules():
            norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
            if norms:
                self._norms[path] = norms
        if self._norms:
            self._watched = OutermostCalls([(path, root.get_submodule(path)) for path in self._norms], self._keep)

    def detach(self) -> None:
        """Stop, and let the inputs go."""
        if self._watched is not None:
            self._watched.remove()
        self._watched = None
        self._norms = {}
        self._forget()

    def begin_step(self) -> None:
        """A training batch begins."""
        if self._watched is None:
            return
        if not self._steps:
            self._unseen = any(map(_collects, self._norms[""]))
        if not self._steps or self._steps[-1]:
            self._steps.append([])

    def _keep(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        collecting = [norm for norm in self._norms[path] if _collects(norm)]
        # In the middle of a backward pass it is activation checkpointing, which does once more what was seen before.
        if self._paused or not collecting or not self._steps or torch._C._current_graph_task_id() != -1:
            return
        if isinstance(module, _BatchNorm):
            raise RuntimeError(
                f"reestimate_batchnorm: the training step calls the BatchNorm layer '{path}' by itself, so its statistics "
                "cannot be estimated anew from the network's inputs. Call the network through forward() or a submodule, or "
                "set reestimate_batchnorm=0."
            )
        self._steps[-1].append(_copied(path, args, kwargs))
        self._collecting.update(dict.fromkeys(collecting))
        self._fresh, self._unseen = True, False

    def run(
        self,
        root: nn.Module,
        context: AbstractContextManager[Any] | None = None,
        progress: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        """Estimate the statistics anew with the collapsed weights in place, unless nothing was trained since the last time.

        All but these statistics is left as it was: other buffers (``num_batches_tracked``, too), momenta, train flags,
        random states, and the attributes of modules that remember something between calls.

        Args:
            root: the module that was attached to.
            context: what a training forward runs in, such as autocast.
            progress: told what is being done, how much of it is, and how much there is.
        """
        if self._unseen:
            self._unseen = False
            warnings.warn(
                "reestimate_batchnorm: no call of a network with BatchNorm layers was seen in the training step (it is one "
                "compiled graph, perhaps), so their statistics are those that training has collected.",
                stacklevel=2,
            )
        if not self._fresh:
            return
        self._fresh, self._paused = False, True
        norms = [norm for norm in self._collecting if norm.track_running_stats]  # not those frozen since
        try:
            with torch.no_grad(), isolated_random_state(), _uncompiled(), context or nullcontext(), _collect_in(root, norms):
                calls = [call for step in self._steps for call in step]
                for done, call in enumerate(calls):
                    progress("batches", done, len(calls))
                    args, kwargs = map_tensors(torch.clone, (call.args, call.kwargs))
                    root.get_submodule(call.module)(*args, **kwargs)
        finally:
            self._paused = False

    def __getstate__(self) -> dict[str, Any]:
        # Pickled with the Trainer by launchers, and copied by users: both begin anew.
        return BatchNormReestimation(self.batches).__dict__


def _collects(norm: _BatchNorm) -> bool:
    return norm.training and norm.track_running_stats


def _copied(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    try:
        return Call(path, *map_tensors(lambda tensor: tensor.detach().clone(), (args, kwargs)))
    except Exception as error:  # an argument of the user's own class may fail in any way
        raise RuntimeError(
            f"reestimate_batchnorm: the inputs of {path or 'forward'} cannot be copied and kept "
            f"({type(error).__name__}: {error}). Set reestimate_batchnorm=0."
        ) from error


def _uncompiled() -> AbstractContextManager[Any]:
    """Compiled networks run as they were written: this mixture of modes is not worth a compilation."""
    # Where dynamo was never imported nothing is compiled, and the import would take seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _collect_in(root: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Evaluation mode, in which every training form collapses; but these layers average their batches' statistics."""
    flags = [(module, module.training) for module in root.modules()]
    attributes = [(module, dict(module.__dict__)) for module in root.modules() if not isinstance(module, TrainingForm)]
    buffers = [(buffer, buffer.clone()) for buffer in root.buffers()]
    estimated = {id(buffer) for norm in norms for buffer in (norm.running_mean, norm.running_var)}
    try:
        root.eval()
        for norm in norms:
            norm.training, norm.momentum = True, None  # None: the plain average
            norm.reset_running_stats()
        yield
    except BaseException:
        estimated = set()
        raise
    finally:
        for module, before in attributes:  # momenta among them
            for name in module.__dict__.keys() - before.keys():
                del module.__dict__[name]
            module.__dict__.update(before)
        for module, flag in flags:
            module.training = flag
        _put_back([(buffer, value) for buffer, value in buffers if id(buffer) not in estimated])


def _put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        if not torch.equal(buffer, before):  # else leave it alone: a backward pass may be waiting for it
            buffer.copy_(before)
