"""Studies, tasks and methods from their YAML files."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from benchmarks.quality.config import PLAIN, Method, Option, Study, StudyError, Task, Teachers, Variant
from benchmarks.quality.keys import Config, get
from benchmarks.quality.plan import KEEP, LAST

HERE = Path(__file__).parent


def find_studies(name: str) -> list[str]:
    """Names of the studies that a pattern with ``*`` stands for; without one, the name itself.

    Raises:
        StudyError: there are none.
    """
    if "*" not in name:
        return [name]
    found = sorted(fnmatch.filter((path.stem for path in (HERE / "studies").glob("*.yaml")), name))
    if not found:
        raise StudyError(f"no study {name} in {HERE / 'studies'}")
    return found


def read_study(name: str) -> Study:
    """Read a study by its name or the path of its file; its tasks are sought beside it first.

    Raises:
        StudyError: a file is missing or says something unusable.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else HERE / "studies" / f"{name}.yaml"
    document = {**DEFAULTS, **read_yaml(path)}
    check_names(path, "a study", document, {*DEFAULTS, *NEEDED}, NEEDED)
    for name, kind in {**dict.fromkeys(("tasks", "stages", "seeds", "bases"), list), "keys": dict, **NUMBERS}.items():
        if not isinstance(document[name], kind) or (name in NEEDED and not document[name]):
            raise StudyError(f"{path}: {name} is {document[name]!r}, no {kind.__name__} with something in it")
    for stage in document["stages"]:
        if not isinstance(stage, list):
            raise StudyError(f"{path}: stages are lists of rows, not {stage!r}")
    methods = {key: _method(key, value or {}) for key, value in read_yaml(HERE / "methods.yaml").items()}
    stages = [[_variant(path, row, methods, document["keys"]) for row in stage] for stage in document["stages"]]
    tasks = {task: read_task(task, [path.parent, HERE]) for task in document["tasks"]}
    bases = {base: read_study(base) for base in document["bases"]}
    numbers = {name: document[name] for name in NUMBERS}
    study = Study(
        path.stem, document["title"], tasks, stages, seeds=document["seeds"], methods=methods, bases=bases, **numbers
    )
    _check_study(path, study)
    for variant in study.known.values():
        _check_row(path, study, variant)
    return study


NEEDED = ("title", "tasks", "stages", "seeds")
NUMBERS = {"trials": int, "refinements": int, "tuning_seed": int}
DEFAULTS: Config = {"trials": 0, "refinements": 0, "tuning_seed": 1000, "bases": [], "keys": {}}


def check_names(
    where: Any, what: str, found: Mapping[str, Any], known: Collection[str], needed: Collection[str] = ()
) -> None:
    """That a part of a file has the names that it needs, and no others: a misspelt one would do nothing."""
    unknown, absent = [name for name in found if name not in known], [name for name in needed if name not in found]
    if unknown:
        names = ", ".join(map(str, unknown))
        raise StudyError(f"{where}: {what} has no {names}; there are {', '.join(sorted(known))}")
    if absent:
        raise StudyError(f"{where}: {what} needs {', '.join(absent)}")


def _check_study(path: Path, study: Study) -> None:
    """What its rows have in common."""
    names = [variant.name for stage in study.stages for variant in stage]
    for word, values in (("row", names), ("seed", study.seeds)):
        twice = {str(value) for value in values if values.count(value) > 1}
        if twice:
            raise StudyError(f"{path}: more than one {word} {', '.join(sorted(twice))}; each needs a name of its own")
    if not all(isinstance(seed, int) for seed in study.seeds):
        raise StudyError(f"{path}: seeds are whole numbers, not {study.seeds}")
    if study.refinements < 0:
        raise StudyError(f"{path}: refinements is {study.refinements}, less than 0")
    searched = [row.name for row in study.known.values() if row.tuned is None]
    if searched and study.trials < 1:
        raise StudyError(f"{path}: {', '.join(searched)} need trials: 1 or more, or the setting of another row (tuned)")


def _check_row(path: Path, study: Study, variant: Variant) -> None:
    """That the rows which a row needs are there, and are such that it can use them."""
    home, tuned = study.source(variant)
    if home.tuning_seed in study.seeds:
        raise StudyError(
            f"{path}: {variant.name} was tuned with the seed {home.tuning_seed}, which is one of the final seeds"
        )
    for name, task in study.tasks.items():
        if name not in home.tasks:
            raise StudyError(f"{path}: {variant.name} takes its setting from a study without the task {name}")
        options, chosen = study.methods[variant.method].space(task), home.methods[tuned.method].space(home.tasks[name])
        check_names(path, f"{variant.name} (fixed): {variant.method}", variant.fixed, options)
        check_names(path, f"{variant.name} (scale): {tuned.method}", variant.scale, chosen)
    if variant.put.get(KEEP) not in (None, LAST):
        raise StudyError(
            f"{path}: {variant.name} keeps {variant.put[KEEP]!r}; it is {LAST!r}, or nothing for the best epoch"
        )
    teachers = study.methods[variant.method].teachers
    against = None if variant.against == PLAIN else variant.against
    for other in (teachers.of if teachers else None, variant.steps_of, against):
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
    check_names(path, "a row", row, [item.name for item in fields(Variant)])
    name = row.get("name", row["method"])
    for part in ("fixed", "scale", "put"):
        if not isinstance(row.get(part, {}), dict):
            raise StudyError(f"{path}: {part} of {name} is {row[part]!r}, no names with values")
    if not all(_is_number(factor) for factor in row.get("scale", {}).values()):
        raise StudyError(f"{path}: scale of {name} is {row['scale']!r}; factors are numbers")
    if row.get("tuned") == name:
        raise StudyError(f"{path}: {name} takes its setting (tuned) from itself; leave that out for trials of its own")
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
    parts = ("title", "score", "options")
    check_names(f"spaces/{name}.yaml", "a space", space, parts, parts)
    start = config.pop("start", None)
    options = {}
    for option, row in space["options"].items():
        check_names(f"spaces/{name}.yaml", f"option {option}", row, OPTION, ("key",))
        default = get(config, row["key"], row.get("default", 0.0 if option == "dropout" else None))
        if default is None:
            raise StudyError(f"spaces/{name}.yaml: option {option} needs a default, for the task has no {row['key']}")
        options[option] = _option(option, {**row, "default": default})
    return Task(name, space["title"], space["score"], config, options, None if start is None else read_task(start, folders))


def _method(name: str, row: Mapping[str, Any]) -> Method:
    known = [item.name for item in fields(Method) if item.name != "name"]
    check_names("methods.yaml", name, row, known)
    options = {key: _option(key, value) for key, value in row.get("options", {}).items()}
    return Method(
        name,
        row.get("title", name),
        options,
        row.get("callbacks", []),
        tuple(row.get("without", ())),
        tuple(row.get("changes", ())),
        row.get("derive", "train"),
        Teachers(**row["teachers"]) if "teachers" in row else None,
        row.get("effort", 1.0),
    )


def _option(name: str, row: Mapping[str, Any]) -> Option:
    kind = next((kind for kind in KINDS if kind in row), None)
    check_names(f"option {name}", "it", row, OPTION)
    if kind is None or row.get("default") is None:
        raise StudyError(f"option {name}: it needs a default and one of log, uniform and choice")
    values, default = row[kind], row["default"]
    if not isinstance(values, list) or not values:
        raise StudyError(f"option {name}: {kind} is {values!r}, no list with something in it")
    if kind != "choice":
        numbers = len(values) == 2 and all(map(_is_number, values))
        if not (numbers and values[0] < values[1] and (kind == "uniform" or values[0] > 0)):
            above = ", above 0" if kind == "log" else ""
            raise StudyError(f"option {name}: {kind} is {values!r}; it takes a lower and a higher limit{above}")
        if not _is_number(default):
            raise StudyError(f"option {name}: its default is {default!r}, no number")
    return Option(default, kind, tuple(values), row.get("key", ""), row.get("relative", False))


KINDS = ("log", "uniform", "choice")
OPTION = (*KINDS, "default", "key", "relative")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
