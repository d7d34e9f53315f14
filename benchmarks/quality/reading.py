"""Studies, tasks and methods from their YAML files."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from benchmarks.quality.config import PLAIN, Method, Option, Study, StudyError, Task, Teachers, Variant
from benchmarks.quality.keys import Config, get
from benchmarks.quality.plan import KEEP, LAST, configure

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


def read_study(name: str, needed_by: tuple[Path, ...] = ()) -> Study:
    """Read a study by its name or the path of its file; its tasks and bases are sought beside it first.

    Args:
        name: of the study, or path.
        needed_by: files of the studies that it is a base of.

    Raises:
        StudyError: a file is missing or says something unusable.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else HERE / "studies" / f"{name}.yaml"
    if needed_by and (beside := needed_by[-1].parent / f"{name}.yaml").exists():
        path = beside
    if path in needed_by:
        raise StudyError(f"{path}: it is a base of itself: {', '.join(other.stem for other in needed_by)}")
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
    bases = {base: read_study(base, (*needed_by, path)) for base in document["bases"]}
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
    _check_needs(path, study, variant)
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
        setting = {**{option: known.default for option, known in chosen.items()}, **variant.fixed}
        try:
            configure(task, study.methods[variant.method], setting, variant.put)
        except ValueError as error:
            raise StudyError(f"{path}: {variant.name} on {name}: {error}") from error
    if variant.put.get(KEEP) not in (None, LAST):
        raise StudyError(
            f"{path}: {variant.name} keeps {variant.put[KEEP]!r}; it is {LAST!r}, or nothing for the best epoch"
        )
    if variant.against not in (*study.known, PLAIN):
        rows = ", ".join(study.known)
        raise StudyError(f"{path}: {variant.name} is compared (against) with {variant.against}, none of the rows {rows}")
    # both times are relative to one row's, and what is put into a configuration may change its time
    if variant.time_of is not None and (variant.put or tuned.against != study.find(variant.time_of)[1].against):
        raise StudyError(f"{path}: {variant.name} has time_of: no put, and both timed against one row, please")


def _check_needs(path: Path, study: Study, variant: Variant, above: tuple[str, ...] = ()) -> None:
    """That the rows which a row needs are there, and that none needs itself."""
    name = f"{study.name}/{variant.name}"
    if name in above:
        raise StudyError(f"{path}: rows need each other's settings or networks: {', '.join(above[above.index(name) :])}")
    teachers = study.methods[variant.method].teachers
    for other in (variant.tuned, variant.steps_of, variant.time_of, teachers.of if teachers else None):
        if other is not None:
            _check_needs(path, *study.find(other), (*above, name))


def _variant(path: Path, row: Any, methods: Mapping[str, Method], keys: Mapping[str, str]) -> Variant:
    """A row of a study; the study's ``keys`` are short names for beginnings of keys in ``put``."""
    if not isinstance(row, (str, dict)):
        raise StudyError(f"{path}: a row is a method's name or has names with values; it is {row!r}")
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
    values = {}
    for key, value in row.get("put", {}).items():
        first, dot, rest = key.partition(".")
        values[f"{keys.get(first, first)}{dot}{rest}"] = value
    return Variant(**{"name": row["method"], **row, "put": values})


def read_task(name: str, folders: Sequence[Path], begun_by: tuple[str, ...] = ()) -> Task:
    """Read ``tasks/NAME.yaml`` and ``spaces/NAME.yaml`` from the first folder that has them.

    Args:
        name: of the task.
        folders: to look into.
        begun_by: tasks that begin with its network.
    """
    if name in begun_by:
        raise StudyError(f"tasks/{name}.yaml: it begins (start) with itself: {', '.join(begun_by)}")
    folder = next((folder for folder in folders if (folder / "tasks" / f"{name}.yaml").exists()), None)
    if folder is None:
        raise StudyError(f"no task {name}: no tasks/{name}.yaml in {' or '.join(map(str, folders))}")
    config, space = read_yaml(folder / "tasks" / f"{name}.yaml"), read_yaml(folder / "spaces" / f"{name}.yaml")
    parts = ("title", "score", "options")
    check_names(f"spaces/{name}.yaml", "a space", space, (*parts, "higher"), parts)
    if get(config, "trainer.max_epochs") is None:
        raise StudyError(f"tasks/{name}.yaml: trainer.max_epochs is needed")
    start = config.pop("start", None)
    first = None if start is None else read_task(start, folders, (*begun_by, name))
    options = {}
    for option, row in _options(f"spaces/{name}.yaml", space["options"]):
        check_names(f"spaces/{name}.yaml", f"option {option}", row, OPTION, ("key",))
        default = get(config, row["key"], row.get("default", 0.0 if option == "dropout" else None))
        if default is None:
            raise StudyError(f"spaces/{name}.yaml: option {option} needs a default, for the task has no {row['key']}")
        options[option] = _option(option, {**row, "default": default})
    return Task(name, space["title"], space["score"], config, options, first, space.get("higher", space["score"] == "acc"))


def _method(name: str, row: Mapping[str, Any]) -> Method:
    known = [item.name for item in fields(Method) if item.name != "name"]
    check_names("methods.yaml", name, row, known)
    options = {key: _option(key, value) for key, value in _options(f"methods.yaml: {name}", row.get("options", {}))}
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


def _options(where: str, found: Any) -> Iterable[tuple[str, Config]]:
    """Options by name, each a mapping."""
    if not isinstance(found, dict) or not all(isinstance(row, dict) for row in found.values()):
        raise StudyError(f"{where}: options are names, each with key, default and one of log, uniform and choice: {found!r}")
    return found.items()


def _option(name: str, row: Mapping[str, Any]) -> Option:
    kind = next((kind for kind in KINDS if kind in row), None)
    check_names(f"option {name}", "it", row, OPTION)
    if kind is None or row.get("default") is None:
        raise StudyError(f"option {name}: it needs a default and one of log, uniform and choice")
    values, default = row[kind], row["default"]
    if not isinstance(values, list) or not values:
        raise StudyError(f"option {name}: {kind} is {values!r}, no list with something in it")
    text = [value for value in (*values, default) if isinstance(value, str) and _spells_number(value)]
    if text:
        raise StudyError(f"option {name}: YAML reads {text[0]} as text; write it with a point, as in 1.0e-3")
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


def _spells_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
