"""The command ``lightning-sop``: LightningCLI for any module and data, and two commands about over-parametrization.

``lightning-sop fit|validate|test|predict --config run.yaml`` runs a Trainer, ``lightning-sop inspect --config run.yaml``
shows what would become of every parameter, ``lightning-sop collapse run.ckpt -o small.ckpt`` writes a deploy file.
"""

import os
import pickle
import sys
import zipfile
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console

PROGRAM = "lightning-sop"
WIDTH_OF_FILES = 160
"""Columns of a table that goes to a file or a pipe, where rich would assume 80."""

PARSER_NOISE = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
"""Beginnings of the lines of jsonargparse's messages that tell the user nothing."""

DTYPES = ("float32", "float16", "bfloat16")


class UsageError(ValueError):
    """The command cannot do what was asked; the message says why and what to do."""


class RunCLI(LightningCLI):
    """LightningCLI that looks at the checkpoint before it builds anything."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and os.path.isfile(path):  # others are Lightning's keywords ("last", "best") and URLs
            check_readable(path)


class InspectCLI(LightningCLI):
    """Builds model, data and Trainer from a configuration of ``fit``, and runs nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # a configuration that `fit --print_config` wrote also holds the arguments of Trainer.fit
        parser.add_method_arguments(Trainer, "fit", skip={"model", "train_dataloaders", "val_dataloaders", "datamodule"})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning's own would warn that words are given where the process has some too: they are the same, less "inspect"
        self.config = parser.parse_args(args)  # type: ignore[arg-type]  # `inspect` gives words, never a dict

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return super().instantiate_trainer(logger=False, **kwargs)  # a dry run leaves no log


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: the words after the program's name; those of this process by default.

    Returns:
        The exit status: 0, or 2 after a mistake of the user's, told in one line on standard error.

    Raises:
        SystemExit: with status 0 when only help or a configuration was asked for, 2 when ``collapse`` lacks an argument.
        Exception: whatever else goes wrong in a run, with its traceback.
    """
    # Lightning calls jsonargparse in ways that it deprecates, which no user of this command can change
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    words = list(sys.argv[1:] if args is None else args)
    command, rest = (words[0], words[1:]) if words else ("", [])
    try:
        if command == "collapse":
            collapse(rest)
        elif command == "inspect":
            inspect(rest)
        else:
            run(None if args is None else words)
    except Exception as error:
        message = message_for_user(error)
        if message is None:
            raise
        print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    return 0


def run(words: list[str] | None) -> None:
    """Train or evaluate: a subcommand of LightningCLI with its options.

    Args:
        words: the words after the program's name; those of this process if None.
    """
    RunCLI(
        args=words,
        # a second run into the same folder is common while trying things; the configuration is then the newer run's
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            **{subcommand: {"exit_on_error": False} for subcommand in LightningCLI.subcommands()},
            "exit_on_error": False,
            "prog": PROGRAM,
            "description": "Train and evaluate any LightningModule from a configuration. Two further commands: "
            f"'{PROGRAM} inspect --help' (what over-parametrization would do with each parameter) and "
            f"'{PROGRAM} collapse --help' (from a training checkpoint to a small plain one).",
        },
    )


def inspect(words: list[str]) -> None:
    """Print what each SimulatedOverparam callback of a configuration would do with every parameter; train nothing.

    Args:
        words: options as for ``fit``.

    Raises:
        UsageError: the configuration has no SimulatedOverparam callback.
    """
    from lightning_sop import SimulatedOverparam

    cli = InspectCLI(
        run=False,
        args=words,
        save_config_callback=None,
        parser_kwargs={
            "exit_on_error": False,
            "prog": f"{PROGRAM} inspect",
            "description": "Show, without training, what becomes of every parameter: counts before and after, and the "
            "reason for each one left alone. Takes the options and configurations of 'fit'. For layers that a module builds "
            "in its setup(), that of the data module is called first; prepare_data() never is. Where one of them cannot run "
            "without training, a line says so, and what exists is shown.",
        },
    )
    configured = cli.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, which mypy cannot see
    callbacks = [callback for callback in configured if isinstance(callback, SimulatedOverparam)]
    if not callbacks:
        raise UsageError("no lightning_sop.SimulatedOverparam among trainer.callbacks: nothing to inspect")
    for note in build_late_layers(cli):
        print(f"{PROGRAM}: note: {' '.join(note.split())}", file=sys.stderr)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_FILES)
    for callback in callbacks:
        console.print(callback.plan(cli.model))


def build_late_layers(cli: LightningCLI) -> list[str]:
    """Run the hooks in which a module may build layers, as ``Trainer._run`` does, but prepare, download and train nothing.

    The data module's ``setup`` comes first, as in a run, and only where the module has one of its own to read its results.

    Args:
        cli: what was built from the configuration.

    Returns:
        What could not be run, one note for each.

    Raises:
        Exception: an error in ``configure_model`` that no failed ``setup`` explains.
    """
    model, trainer, notes = cli.model, cli.trainer, []
    # what the hooks may read: self.trainer with its datamodule, module and stage; no process and no device is set up
    trainer.state.fn, trainer.training = TrainerFn.FITTING, True
    trainer.strategy.connect(model)
    trainer._data_connector.attach_data(model, datamodule=cli.datamodule)
    owners = (cli.datamodule, model) if is_overridden("setup", model) else ()
    for owner in owners:
        if owner is None:
            continue
        try:
            owner.setup(stage=TrainerFn.FITTING)
        except Exception as error:  # user code, perhaps in want of prepared data, of processes or of a device
            what = f"{type(owner).__name__}.setup()"
            notes.append(f"{what} cannot run without training, layers that need it are not shown: {told(error)}")
    try:
        model.configure_model()
    except Exception as error:
        if not notes:
            raise
        notes.append(f"{type(model).__name__}.configure_model() could not run after that: {told(error)}")
    return notes


def told(error: Exception) -> str:
    """An error's type and message."""
    return f"{type(error).__name__}: {error}"


def collapse(words: list[str]) -> None:
    """Write the plain deploy checkpoint of a training checkpoint, and print its receipt.

    Args:
        words: the training checkpoint and options.

    Raises:
        UsageError: source and target are the same file.
        FileNotFoundError: no such training checkpoint.
        DeployFileError: the source is corrupt, truncated or no Lightning checkpoint.
        CollapseError: the collapsed weights are not those that were trained.
    """
    from lightning_sop.deploy import collapse_file, deploy_path

    parser = ArgumentParser(
        exit_on_error=False,
        prog=f"{PROGRAM} collapse",
        description="Write the small plain checkpoint that a training checkpoint collapses to.",
    )
    parser.add_argument("source", help="training checkpoint")
    parser.add_argument("-o", "--output", help="file to write, .ckpt or .safetensors (default: SOURCE's stem.deploy.ckpt)")
    parser.add_argument("--dtype", choices=DTYPES, help="floating-point type of the written weights (default: as trained)")
    parser.add_argument(
        "--keep_compiled_names",
        action="store_true",
        help="keep the '_orig_mod.' that torch.compile puts into names, for a class that compiles parts in its own __init__ "
        "(default: names are stripped of it)",
    )
    options = parser.parse_args(words)
    source, target = options.source, options.output or deploy_path(options.source)
    if os.path.realpath(source) == os.path.realpath(target):
        raise UsageError(f"{target}: would overwrite the training checkpoint; name another file with -o")
    receipt = collapse_file(source, target, dtype=options.dtype, keep_compiled_names=options.keep_compiled_names)
    print(f"wrote {target}")
    for key, value in receipt.items():
        print(f"  {key}: {value}")


def check_readable(path: str) -> None:
    """Refuse a checkpoint that torch cannot load as plain data, which is how LightningCLI loads it.

    Args:
        path: a local file.

    Raises:
        UsageError: the file is corrupt, truncated, no checkpoint, or holds objects of classes.
    """
    try:
        # mapped into memory, the weights themselves are not read
        torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UsageError(
            f"{path}: corrupt, truncated, or no checkpoint of plain data; copy it again or use another one"
        ) from error


def message_for_user(error: Exception) -> str | None:
    """The text of an error that is the user's to mend, or None for a defect, which must keep its traceback.

    The user's are: a command line or configuration that does not parse, a file that is not there, a setting that
    Lightning refuses, and a refusal raised in this package's own code, whose texts are written for users.
    """
    if isinstance(error, ArgumentError):
        return parser_message(str(error))
    cause: BaseException | None = error
    while cause is not None:  # jsonargparse wraps what a constructor raises
        if isinstance(cause, FileNotFoundError | MisconfigurationException) or raised_in_package(cause):
            return str(cause)
        cause = cause.__cause__
    return None


def raised_in_package(error: BaseException) -> bool:
    """Whether a ValueError, RuntimeError or OSError was raised by a line of this package, not of one that it calls."""
    traceback = error.__traceback__
    if traceback is None or not isinstance(error, ValueError | RuntimeError | OSError):
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    module: str = traceback.tb_frame.f_globals.get("__name__", "")
    return module.split(".")[0] == "lightning_sop"


def parser_message(text: str) -> str:
    """A message of jsonargparse without the lines that only repeat the expected types and the whole given value."""
    kept = [line for line in text.splitlines() if not line.strip().startswith(PARSER_NOISE)]
    return " ".join(kept)


if __name__ == "__main__":
    sys.exit(main())
