"""What a study asks of its tasks, looked at before anything is trained: hours later is too late for a mistake."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden

from benchmarks.quality.build import build
from benchmarks.quality.config import Study
from benchmarks.quality.place import Place
from benchmarks.quality.plan import Results, plan

STEPS = ("training_step", "validation_step", "test_step")
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def unusable(study: Study, results: Results, place: Place) -> dict[tuple[str, str], str]:
    """Build model, data and Trainer of each row that has runs left, once.

    Returns:
        By task and row: what is wrong with it.
    """
    found: dict[tuple[str, str], str] = {}
    looked_at = set()
    for slot in plan(study, results):
        where = slot.task, slot.variant.name
        if slot.run is None or slot.run.key in results or where in looked_at:
            continue
        looked_at.add(where)
        try:
            wrong = list(problems(build(slot.run.config, place, slot.run.seed), slot.run.config.get("derive")))
        except (Exception, SystemExit) as error:  # what LightningCLI says is of many types
            wrong = [str(error) or type(error).__name__]
        if wrong:
            found[where] = "; ".join(wrong)
    return found


def problems(cli: Any, derive: str | None) -> Iterator[str]:
    """What a task's module, data and Trainer lack."""
    if cli.datamodule is None:
        yield "it has no data"
        return
    for part, names in ((cli.model, STEPS), (cli.datamodule, LOADERS)):
        absent = [name for name in names if not is_overridden(name, part)]
        if absent:
            yield f"{type(part).__name__} has no {', '.join(absent)}"
    if cli.trainer.check_val_every_n_epoch != 1 or cli.trainer.val_check_interval not in (1, None):
        yield "it validates at other times than after each epoch, by which its curves and its best epoch are counted"
    if derive == "ensemble" and not hasattr(cli.model, "net"):
        yield f"{type(cli.model).__name__} has no net, the part whose outputs are logits, in whose place an ensemble is put"
