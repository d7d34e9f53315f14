"""BatchNorm statistics for the collapsed weights, from inputs of recent training forwards."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_sop.callbacks.outermost import OutermostCalls
from lightning_sop.deploy.replay import map_tensors

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class BatchNormReestimation:
    """Running statistics as ``torch.optim.swa_utils.update_bn`` would make them, without a pass over the data loader.

    While training, running means and variances are collected under mixed weights; the network that is evaluated has the
    collapsed ones. The inputs of the last ``batches`` training forwards are kept (not copied) and run through the network
    again, in train mode, with the collapsed weights in place.

    Args:
        batches: how many training batches to keep and use; 0 switches everything off.
    """

    def __init__(self, batches: int) -> None:
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
            raise ValueError(f"reestimate_batchnorm is a number of training batches, 0 or more, not {batches!r}")
        self.batches = batches
        self._recent: dict[str, deque[Inputs]] = {}
        self._calls: OutermostCalls | None = None

    def attach(self, root: nn.Module) -> None:
        """Begin to keep inputs, where there is a BatchNorm layer at all."""
        if self.batches and self._calls is None and any(isinstance(m, _BatchNorm) for m in root.modules()):
            self._calls = OutermostCalls(root, self._keep)

    def detach(self) -> None:
        """Stop, and let the inputs go."""
        if self._calls is not None:
            self._calls.remove()
        self._calls = None
        self._recent.clear()

    def _keep(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return  # evaluation
        if isinstance(module, _BatchNorm):
            raise RuntimeError(
                f"reestimate_batchnorm: the training step calls the BatchNorm layer '{path}' by itself, so its statistics "
                "cannot be estimated anew from the network's inputs. Call the network through forward() or a submodule, or "
                "set reestimate_batchnorm=0."
            )
        if any(isinstance(child, _BatchNorm) for child in module.modules()):
            inputs = map_tensors(lambda tensor: tensor.detach(), (args, kwargs))
            self._recent.setdefault(path, deque(maxlen=self.batches)).append(inputs)

    @torch.no_grad()
    def run(self, root: nn.Module) -> None:
        """Estimate the statistics anew, with the collapsed weights in place; train flags and momenta stay as they were."""
        for path, recent in self._recent.items():
            network = root.get_submodule(path)
            norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
            flags = {module: module.training for module in network.modules()}
            momenta = {norm: norm.momentum for norm in norms}
            try:
                network.eval()  # no dropout; and every training form collapses, whatever the flag was
                for norm in norms:
                    norm.training, norm.momentum = True, None  # None: the plain average over the batches
                    norm.reset_running_stats()
                for args, kwargs in recent:
                    network(*args, **kwargs)
            finally:
                for norm, momentum in momenta.items():
                    norm.momentum = momentum
                for module, flag in flags.items():
                    module.training = flag
