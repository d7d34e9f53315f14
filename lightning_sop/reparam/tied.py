"""The other layers that share a weight in training form."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_sop.reparam.form import TrainingForm
from lightning_sop.reparam.names import owner_key


class TiedForm(nn.Module):
    """Marks another layer that shares a weight in training form, so that its entry in a state_dict is collapsed too."""

    __jit_unused_properties__ = ("form",)  # TorchScript makes an empty part of it

    def __init__(self, form: TrainingForm, name: str) -> None:
        super().__init__()
        self.__dict__["_form"] = form  # not registered: the form is a child of its own layer
        self._name = name

    def extra_repr(self) -> str:
        return f"{self._name} is {self.form.site.name}"

    @property
    def form(self) -> TrainingForm:
        """The form of the shared weight."""
        form: TrainingForm = self.__dict__["_form"]
        return form

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return self.form.save_as(owner_key(prefix, self._name), {} if destination is None else destination, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.form.accept_loaded()
