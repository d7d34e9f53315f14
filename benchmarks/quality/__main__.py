"""Train methods with tuned settings on several tasks, paired by seed, and compare them.

    python -m benchmarks.quality run --study core --data FOLDER [--tasks ...] [--methods ...] [--jobs 2] [--limit-minutes 60]
    python -m benchmarks.quality estimate --study core
    python -m benchmarks.quality time --study core --data FOLDER
    python -m benchmarks.quality table --study core
    python -m benchmarks.quality table --study 'ablation_*'
    python -m benchmarks.quality why --study mechanism --data FOLDER

A study is a file in benchmarks/quality/studies, or a path: core; variants, defaults and tuned_options, about the options of
Majority Kernels; averages; same_setting, without what the search leaves to chance; last_epoch, without tuning and early
stopping; small, the larger tasks in small; the larger gpu and gpu_finetune; and mechanism and ablation_*, whose rows begin
with the settings that core has chosen. Every finished run is a line in RESULTS/TASK.jsonl; a study that was stopped or
killed goes on where it was. Networks that others are made of are kept in the folder given by --networks; one that is lost
is trained again. Settings are chosen on a seed of their own by the validation loss; the test is read once for each final
run. Several of these commands may work on one study at the same time: each run is begun by one of them.

A task of your own is tasks/NAME.yaml, a configuration of LightningCLI in full (class_path and init_args) with
trainer.max_epochs, and spaces/NAME.yaml with its title, its score, whether that is better if higher, and the options that
are searched for all methods; "lr" is the one that further trials bracket. Both lie beside the study. Its module logs
val_loss and test_loss, and val_SCORE and test_SCORE, once in each epoch; its data module has all three loaders. An argument
"seed" of the data, where the task names it, is the split's: without one all seeds have the same split. Arguments "path" and
"root" are below --data, and are guarded against other files. Some methods ask for more: distilled and k_ensemble for
classification, with logits from forward(batch[0]), and k_ensemble for them from a part "net"; gradient_penalty and SGD for
attributes "lr" and "weight_decay"; wide and wide_reduced for layers that they know (benchmarks/quality/baselines/wide.py).
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.quality.config import Study, StudyError
from benchmarks.quality.estimate import Estimate
from benchmarks.quality.execute import execute
from benchmarks.quality.keys import get
from benchmarks.quality.place import PATHS, Place, check_data, digests
from benchmarks.quality.reading import HERE, find_studies, read_study
from benchmarks.quality.store import Store

RESULTS = HERE.parent / "results" / "quality"


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 1 where runs had errors, 2 for a mistake of the user's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "time", "table", "estimate", "why"))
    parser.add_argument(
        "--study", default="core", help="name or path of the study, or several: 'ablation_*' (default: core)"
    )
    parser.add_argument("--data", type=Path, help="folder that the paths in tasks are relative to")
    parser.add_argument("--tasks", nargs="+", help="only these")
    parser.add_argument("--methods", nargs="+", help="only these rows")
    parser.add_argument("--jobs", type=positive, default=2, help="processes (default: 2)")
    parser.add_argument("--limit-minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--accelerator", default="auto", help="of the Trainer (default: auto)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--networks", type=Path, default=Path("quality_networks"), help="folder for trained networks")
    options = parser.parse_args(words)
    try:
        found = [read_study(name) for name in find_studies(options.study)]
        if "*" in options.study:  # of several, those that have the tasks
            found = [study for study in found if set(options.tasks or ()) <= set(study.tasks)]
            if not found:
                raise StudyError(f"none of the studies {options.study} has the tasks {', '.join(options.tasks)}")
        studies = [study.only(options.tasks, options.methods) for study in found]
        status = max((do(study, options) for study in studies), default=0)
        if options.command == "table" and len(studies) > 1:
            from benchmarks.quality.table import write_overview

            store = Store(options.results).read(list({file: None for study in studies for file in study.files}))
            path = options.results / f"{options.study.replace('*', 'all')}.md"
            print(f"wrote {write_overview(studies, store.results, path, command_of(options, options.study))}")
    except (StudyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


def positive(word: str) -> int:
    """A number of processes."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def do(study: Study, options: argparse.Namespace) -> int:
    """The command for one study."""
    store = Store(options.results).read(study.files)
    if options.command == "run":
        return run(study, store, options)
    if options.command == "estimate":
        Console().print(Estimate(study, store.results).table(options.jobs))
        return 0
    if options.command == "time":
        return time_steps(study, store, options)
    if options.command == "why":
        return explain(study, store, options, command_of(options, own_name(study, options)))
    from benchmarks.quality.table import write

    print(f"wrote {write(study, store.results, options.results, command_of(options, own_name(study, options)))}")
    return 0


def own_name(study: Study, options: argparse.Namespace) -> str:
    """What a study is asked for by: a path, if it was one."""
    return study.name if "*" in options.study else options.study


def command_of(options: argparse.Namespace, name: str) -> str:
    """What makes a page, for its head."""
    words = ["python", "-m", "benchmarks.quality", options.command, "--study", name]
    for option in ("tasks", "methods"):
        if getattr(options, option):
            words += [f"--{option}", *getattr(options, option)]
    if options.results != RESULTS:
        words += ["--results", str(options.results)]
    return shlex.join(words)


def run(study: Study, store: Store, options: argparse.Namespace) -> int:
    """Perform what is not finished."""
    place = place_of(study, store, options)
    for option in ("results", "networks"):  # before anything is trained
        check_folder(getattr(options, option), f"--{option}")
    return 1 if execute(study, store, place, jobs=options.jobs, minutes=options.limit_minutes) else 0


def time_steps(study: Study, store: Store, options: argparse.Namespace) -> int:
    """Time steps of the chosen settings, where that is not done."""
    from benchmarks.quality.timing import measure, missing, restore
    from benchmarks.quality.train import quiet

    quiet()
    place = place_of(study, store, options)
    pairs, waiting = missing(study, store.results, place)
    for run, other in pairs:
        for one in (run, other):
            restore(one, store.results, place)
        store.add(line := measure(run, other, place))
        print(f"{run.task} {run.method}: {', '.join(f'{ratio:.3f}' for ratio in line['cost']['ratios'])}", flush=True)
    if waiting:
        print(f"not timed: {', '.join(waiting)}, whose networks were never trained; run the study first", file=sys.stderr)
    return 1 if waiting else 0


def explain(study: Study, store: Store, options: argparse.Namespace, command: str) -> int:
    """Train a network of each row again, and measure along it."""
    from benchmarks.quality.train import quiet
    from benchmarks.quality.why import why

    quiet()
    for path in why(study, store.results, place_of(study, store, options), options.results, command):
        print(f"wrote {path}")
    return 0


def place_of(study: Study, store: Store, options: argparse.Namespace) -> Place:
    """Where to run, with all data there: the files that earlier results were made from."""
    found: dict[str, dict[str, str]] = {}
    for task in (*study.tasks.values(), *(task.start for task in study.tasks.values() if task.start)):
        for name in PATHS:
            path = get(task.config, f"data.init_args.{name}")
            if path is None:
                continue
            if not Path(options.data or "", path).exists():
                where = f"{options.data} has no {path}" if options.data else f"it needs {path} in the folder given by --data"
                raise StudyError(f"task {task.name}: {where}")
            found.setdefault(task.name, {}).update(digests(options.data or Path(), path))
        check_data(task.name, found.get(task.name, {}), store.results)
    data = str(options.data) if options.data else None
    return Place(data, str(options.networks), options.accelerator, commit(), found)


def check_folder(folder: Path, option: str) -> None:
    """That files can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StudyError(f"{option}: nothing can be written into {folder} ({error})") from error


def commit() -> str | None:
    """Of the code, with a + if files of the study or of the package differ from it."""
    try:
        found = git("describe", "--always", "--abbrev=10", "--exclude=*")
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", str(HERE), str(HERE.parents[1] / "lightning_sop")
        )
        return f"{found}+" if changed else found
    except (OSError, subprocess.SubprocessError):
        return None


def git(*words: str) -> str:
    """What git says of this repository."""
    command = ["git", "-C", str(HERE), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
