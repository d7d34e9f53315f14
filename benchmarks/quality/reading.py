"""Studies, tasks and methods from their YAML files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from benchmarks.quality.config import Method, Option, Study, StudyError, Task, Teachers, Variant
from benchmarks.quality.keys import Config, get

HERE = Path(__file__).parent


def find_studies(name: str) -> list[str]:
    """Names of the studies that a pattern with ``*`` stands for; without one, the name itself.

    Raises:
        StudyError: there are none.
    """
    if "*" not in name:
        return [name]
    found = sorted(path.stem for path in (HERE / "studies").glob(f"{name}.yaml"))
    if not found:
        raise StudyError(f"no study {name} in {HERE / 'studies'}")
    return found


def read_study(name: str) -> Study:
    """Read a study by its name or the path of its file; its tasks are sought beside it first.

    Raises:
        StudyError: a file is missing or says something unusable.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else HERE / "studies" / f"{name}.yaml"
    document = read_yaml(path)
    methods = {key: _method(key, value or {}) for key, value in read_yaml(HERE / "methods.yaml").items()}
    stages = [[_variant(path, row, methods, document.get("keys", {})) for row in stage] for stage in document["stages"]]
    bases = {base: read_study(base) for base in document.get("bases", [])}
    tasks = {task: read_task(task, [path.parent, HERE]) for task in document["tasks"]}
    seeds, tuning_seed = list(document["seeds"]), int(document.get("tuning_seed", 1000))
    if tuning_seed in seeds:
        raise StudyError(f"{path}: the tuning seed {tuning_seed} is one of the final seeds")
    trials = int(document.get("trials", 0))
    refinements = int(document.get("refinements", 0))
    study = Study(path.stem, document["title"], tasks, stages, trials, tuning_seed, seeds, methods, bases, refinements)
    for variant in study.known.values():
        _check(path, study, variant)
    return study


def _check(path: Path, study: Study, variant: Variant) -> None:
    """That the rows which a row needs are there, and are such that it can use them."""
    home, tuned = study.source(variant)
    for task in study.tasks:
        if task not in home.tasks:
            raise StudyError(f"{path}: {variant.name} takes its setting from a study without the task {task}")
    teachers = study.methods[variant.method].teachers
    for other in (teachers.of if teachers else None, variant.steps_of):
        if other is not None:
            study.find(other)
    # both times are relative to one row's, and what is put into a configuration may change its time
    if variant.time_of is not None and (variant.put or tuned.against != study.find(variant.time_of)[1].against):
        raise StudyError(f"{path}: {variant.name} has time_of: no put, and both timed against one row, please")


def _variant(path: Path, row: Any, methods: Mapping[str, Method], keys: Mapping[str, str]) -> Variant:
    """A row of a study; the study's ``keys`` are short names for beginnings of keys in ``put``."""
    row = {"method": row} if isinstance(row, str) else dict(row)
    if row.get("method") not in methods:
        raise StudyError(f"{path}: no method {row.get('method')!r}; there are {', '.join(methods)}")
    unknown = set(row) - {item.name for item in fields(Variant)}
    if unknown:
        raise StudyError(f"{path}: a row has no {', '.join(sorted(unknown))}")
    values = {}
    for key, value in row.get("put", {}).items():
        first, dot, rest = key.partition(".")
        values[f"{keys.get(first, first)}{dot}{rest}"] = value
    return Variant(**{"name": row["method"], **row, "put": values})


def read_task(name: str, folders: Sequence[Path]) -> Task:
    """Read ``tasks/NAME.yaml`` and ``spaces/NAME.yaml`` from the first folder that has them."""
    folder = next((folder for folder in folders if (folder / "tasks" / f"{name}.yaml").exists()), None)
    if folder is None:
        raise StudyError(f"no task {name}: no tasks/{name}.yaml in {' or '.join(map(str, folders))}")
    config, space = read_yaml(folder / "tasks" / f"{name}.yaml"), read_yaml(folder / "spaces" / f"{name}.yaml")
    start = config.pop("start", None)
    options = {}
    for option, row in space["options"].items():
        default = get(config, row["key"], row.get("default", 0.0 if option == "dropout" else None))
        options[option] = _option(option, {**row, "default": default})
    return Task(name, space["title"], space["score"], config, options, None if start is None else read_task(start, folders))


def _method(name: str, row: Mapping[str, Any]) -> Method:
    options = {key: _option(key, value) for key, value in row.get("options", {}).items()}
    return Method(
        name,
        row.get("title", name),
        options,
        row.get("raise", {}),
        row.get("callbacks", []),
        tuple(row.get("without", ())),
        tuple(row.get("changes", ())),
        row.get("derive", "train"),
        Teachers(**row["teachers"]) if "teachers" in row else None,
        row.get("effort", 1.0),
    )


def _option(name: str, row: Mapping[str, Any]) -> Option:
    kind = next((kind for kind in ("log", "uniform", "choice") if kind in row), None)
    if kind is None or row.get("default") is None:
        raise StudyError(f"option {name}: it needs a default and one of log, uniform and choice")
    return Option(row["default"], kind, tuple(row[kind]), row.get("key", ""), row.get("relative", False))


def read_yaml(path: Path) -> Config:
    """Read a YAML file that holds a mapping."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise StudyError(f"{path}: no such file") from error
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise StudyError(f"{path}: it must hold names with values")
    return content
