"""``lightning-sop fuse``: trained networks in files become a larger one in a file, without training."""

from __future__ import annotations

import io
import math
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_sop.callbacks._growing import load_donor
from lightning_sop.callbacks._growing_run import calls_of_step
from lightning_sop.callbacks._step_loss import check_loss, loss_of_step
from lightning_sop.commands.building import FUSION, PROGRAM, LonelyCLI, UsageError, Words, connect, console, first_batch
from lightning_sop.deploy.content import LIGHTNING_VERSION, from_checkpoint
from lightning_sop.deploy.files import exists, local_path, write_atomically
from lightning_sop.deploy.plain import keep_plain
from lightning_sop.deploy.weights import equal_names, sha256
from lightning_sop.growth import Fusion, FusionError
from lightning_sop.growth import fuse as fuse_networks
from lightning_sop.growth.check import check_shapes
from lightning_sop.growth.norms import GROUPS

FORMAT = 1


def fuse(words: Sequence[str]) -> None:
    """Write the network that donors fuse to, and print the plan and the proof.

    Args:
        words: donors, and options.

    Raises:
        UsageError: a mistake in the words, or a configuration from which no network can be probed.
        FusionError: a donor that cannot be read, or donors that do not fit the grown network.
    """
    options, rest = parse(words)
    check_paths(options)
    cli = LonelyCLI(
        run=False,
        args=rest,
        save_config_callback=None,
        parser_kwargs={"exit_on_error": False, "prog": f"{PROGRAM} fuse"},
    )
    grown = cli.model
    set_up(cli)
    donors = load_donors(options.donors, grown)
    batch = first_batch(cli)
    calls = calls_of_step(None, grown, batch, 0)
    if not calls:
        raise UsageError(
            f"{type(grown).__name__}.training_step() calls no network when it runs outside of a Trainer, so nothing can be "
            "probed: fuse in a run, with lightning_sop.DeepFusionGrow and the schedule AtStep(0)"
        )
    try:
        check_shapes(donors, grown, new_units=options.widen is not None)
        if options.widen == "gradmax":
            check_loss(None, grown, batch, 0)
        fusion = fuse_networks(
            donors,
            grown,
            calls,
            weights=options.weights,
            off_diagonal=options.off_diagonal,
            chunks=dict(options.chunks),
            widen=options.widen,
            norm=options.norm,
            seed=options.seed,
            loss=partial(loss_of_step, None, batch=batch, index=0) if options.widen == "gradmax" else None,
        )
    except FusionError as error:
        names = ", ".join(f"{number} is {path}" for number, path in enumerate(options.donors, 1))
        raise FusionError(f"{error} (donors: {names}; the grown model is the configuration's)") from error
    omitted = write(options.output, grown, about(options, grown, fusion))
    out = console()
    out.print(fusion.layout.table())
    for line in report(options, fusion, omitted):
        out.print(line, markup=False, highlight=False)


# ---------------------------------------------------------------------- words


def parse(words: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The command's own options, and the words for LightningCLI."""
    parser = Words(
        exit_on_error=False,
        allow_abbrev=False,
        prog=f"{PROGRAM} fuse",
        description="Fuse trained networks into a larger one that computes the weighted average of their outputs, without "
        "training. The configuration is one of 'fit': its model is the grown network, the first training batch of its data "
        "is the probe. All options of 'fit' work here too, as --name=value.",
    )
    parser.add_argument("donors", nargs="+", help="checkpoints or deploy files; the same twice is copied (self-fusion)")
    parser.add_argument("--config", action="append", required=True, help="configuration of the grown network")
    parser.add_argument("-o", "--output", required=True, help="checkpoint to write, .ckpt")
    parser.add_argument("--weights", nargs="+", type=float, help="what each donor counts in the average; sum 1")
    parser.add_argument(
        "--norm",
        choices=("joint", "grouped"),
        default="joint",
        help="norms over the units of different donors: left as they are, with a measured gap; or split into one for each "
        "donor, exact, but another architecture (default: joint)",
    )
    parser.add_argument("--off_diagonal", type=float, default=0.0, help="noise between donors, relative to their weights")
    parser.add_argument("--chunks", nargs="+", type=chunk, default=[], metavar="PATTERN=N", help="equal parts of outputs")
    parser.add_argument(
        "--widen", choices=("new", "copy", "gradmax"), help="what fills units beyond the donors' (default: refuse)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of gradmax (default: 0)")
    options, rest = parser.parse_known_args(with_values(words, parser))
    return options, [*(f"--config={path}" for path in options.config), *rest]


def with_values(words: Sequence[str], parser: Words) -> list[str]:
    """Options of LightningCLI as one word each, ``--name=value``, so that no value is taken for a donor."""
    result: list[str] = []
    for word in words:
        before = result[-1] if result else ""
        foreign = before.startswith("--") and "=" not in before and before not in parser._option_string_actions
        if foreign and not word.startswith("--"):
            result[-1] = f"{before}={word}"
        else:
            result.append(word)
    return result


def chunk(word: str) -> tuple[str, int]:
    """``PATTERN=N``."""
    pattern, _, number = word.rpartition("=")
    if not pattern or not number.isdecimal():
        raise ValueError(word)
    return pattern, int(number)


def check_paths(options: Namespace) -> None:
    """Refuse files that are not there, or would be overwritten, before anything is built.

    Raises:
        UsageError: names the file.
    """
    for path in options.donors:
        if not exists(path):
            raise UsageError(f"donor {path}: no such file")
    if place(options.output) in map(place, [*options.donors, *options.config]):
        raise UsageError(f"{options.output}: would overwrite an input; name another file with -o")
    if options.output.endswith(".safetensors"):
        raise UsageError(
            f"{options.output}: a fused network is written as .ckpt; make a .safetensors file of that with "
            f"'{PROGRAM} collapse fused.ckpt -o fused.safetensors'"
        )


def place(path: str) -> str:
    """What two names of one file have in common."""
    local = local_path(path)
    return path if local is None else os.path.realpath(local)


# ---------------------------------------------------------------------- networks


def set_up(cli: LonelyCLI) -> None:
    """The hooks of data and module that come before training, in Lightning's order."""
    connect(cli)
    owners = [owner for owner in (cli.datamodule, cli.model) if owner is not None]
    for owner in owners:
        owner.prepare_data()
    for owner in owners:
        owner.setup(stage="fit")
    cli.model.configure_model()


def load_donors(paths: Sequence[str], like: LightningModule) -> list[nn.Module]:
    """The donors, one object for each file.

    Raises:
        FusionError: names the file that is no network of the class of ``like``.
    """
    networks: dict[str, nn.Module] = {}
    for path in paths:
        if place(path) not in networks:
            module = load_donor(path, like).module
            assert module is not None
            networks[place(path)] = module
    return [networks[place(path)] for path in paths]


# ---------------------------------------------------------------------- the file


def about(options: Namespace, grown: nn.Module, fusion: Fusion) -> dict[str, Any]:
    """How a fused network was made, as plain data."""
    groups = {
        name.rpartition(".")[0]: tensor.tolist()
        for name, tensor in grown.state_dict().items()
        if isinstance(tensor, Tensor) and name.rpartition(".")[2] == GROUPS
    }
    return {
        "format_version": FORMAT,
        "donors": [os.path.basename(path) for path in options.donors],
        "weights": list(fusion.layout.weights),
        "norm": "grouped" if groups else "joint",
        "groups": groups,
        "off_diagonal": options.off_diagonal,
        "widen": options.widen,
        "gap": fusion.proof.gap,
        "promised": fusion.proof.promised,
        "inexact": list(fusion.proof.inexact),
    }


def write(path: str, grown: LightningModule, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Write a checkpoint that ``load_from_checkpoint`` takes; it is read back before it takes its name.

    Returns:
        Hyper-parameters that are not plain data and were left out.
    """
    checkpoint: dict[str, Any] = {LIGHTNING_VERSION: lightning.__version__, "state_dict": grown.state_dict()}
    grown.on_save_checkpoint(checkpoint)
    content = from_checkpoint(checkpoint, ties=equal_names(checkpoint["state_dict"]))
    # as Lightning writes them, with the class path by which LightningCLI builds the module
    hyper_parameters, omitted = keep_plain(dict(grown.hparams), "ckpt")
    plain = {**content.extras, "state_dict": content.state_dict, FUSION: dict(entry)}
    if hyper_parameters:
        plain["hparams_name"] = getattr(grown, "_hparams_name", None)
        plain["hyper_parameters"] = hyper_parameters
    buffer = io.BytesIO()
    torch.save(plain, buffer)

    def check(written: str) -> None:
        state = torch.load(written, map_location="cpu", weights_only=True)["state_dict"]
        if sha256(state) != sha256(content.state_dict):
            raise OSError(f"{path}: what was read back is not what was written; is the disk full?")

    write_atomically(path, buffer.getvalue(), check)
    return (*content.omitted, *omitted)


def report(options: Namespace, fusion: Fusion, omitted: Sequence[str]) -> list[str]:
    """What was written, and how good it is."""
    layout, proof = fusion.layout, fusion.proof
    shares = ", ".join(f"{weight:.4g} x {path}" for path, weight in zip(options.donors, layout.weights, strict=True))
    size = sum(math.prod(tensor.shape) for tensor in layout.tensors.values())
    lines = [f"wrote {options.output}", f"  average: {shares}", f"  values: {size:,}", f"  gap: {proof}"]
    if proof.inexact:
        lines.append(f"  norms over units of several donors: {', '.join(proof.inexact)}; --norm grouped is exact")
    if layout.averaged and not proof.promised:
        lines.append(f"  the donors' average is taken before {', '.join(layout.averaged)}, which may not be linear")
    for layer, text in layout.widened.items():
        lines.append(f"  units of {layer}: {text}")
    if options.norm == "grouped" and fusion.op.number_of_sources > 1:
        lines.append("  norms are grouped: the plain class does not load the file strictly, see docs/methods/deep_fusion.md")
    if omitted:
        lines.append(f"  not plain data, left out: {', '.join(omitted)}")
    return lines
