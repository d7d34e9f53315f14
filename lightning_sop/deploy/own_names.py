"""Names with ``_orig_mod.``: which of them a class gives itself, by compiling parts of it in its own ``__init__``."""

from __future__ import annotations

import io
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_sop.deploy.content import DeployContent, dumps
from lightning_sop.deploy.replay import isolated_random_state
from lightning_sop.deploy.weights import plain_name

STRIPPED = "the names of compiled parts were stripped of '_orig_mod.'"


class OwnNames:
    """Builds a class anew, the way the deploy file's reader will, and sees which names it has; once for each module."""

    def __init__(self) -> None:
        self._asked: weakref.ref[nn.Module] | None = None
        self._answer: tuple[dict[str, str], str] = {}, ""

    def of(self, module: Any, saved: Iterable[str], content: DeployContent) -> tuple[dict[str, str], str]:
        """Names to write, by plain name, where they are not the plain ones.

        Args:
            module: The LightningModule that was trained; a new one is made by its class's ``load_from_checkpoint``.
            saved: Its names as they are now, with whatever was compiled since.
            content: What is to be written, with plain names.

        Returns:
            The names, and a remark where they could not be found out.
        """
        if all(name == plain_name(name) for name in saved):
            return {}, ""
        if self._asked is None or self._asked() is not module:
            self._asked, self._answer = weakref.ref(module), _names_built_anew(type(module), content)
        return self._answer


def compiled_names(names: Iterable[str]) -> dict[str, str]:
    """Those of the names that have ``_orig_mod.``, by plain name."""
    return {plain_name(name): name for name in names if name != plain_name(name)}


def with_names(content: DeployContent, names: dict[str, str]) -> DeployContent:
    """The content with these names in the place of plain ones."""
    return replace(content, state_dict={names.get(name, name): value for name, value in content.state_dict.items()})


def _names_built_anew(kind: Any, content: DeployContent) -> tuple[dict[str, str], str]:
    try:
        # On the meta device nothing is computed, and what is drawn is given back.
        with torch.device("meta"), isolated_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = io.BytesIO(dumps(content, "ckpt"))
            built = kind.load_from_checkpoint(file, map_location="meta", strict=False, weights_only=True)
            return compiled_names(built.state_dict()), ""
    except Exception as error:  # the user's own class, and perhaps without all of its hyper-parameters
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return {}, f"{STRIPPED}; whether {kind.__name__} needs it is not known, for it could not be built anew ({reason})"
