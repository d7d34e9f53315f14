"""The notebooks run from top to bottom without a warning, and are committed as such a run leaves them."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS, BYTES = 120, 600_000
PATH = re.compile(r"(?<![\w.])/(home|root|Users|tmp|var|work|private|mnt|usr|opt)/\w|\b[A-Z]:\\\\\w|site-packages")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(ROOT / "notebooks" / "execute.py", "execute_notebooks")


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds_of(notebook: Any) -> list[set[tuple[str, ...]]]:
    """What each cell puts out: streams, texts, pictures."""
    return [{(o.output_type, o.get("name", ""), *sorted(o.get("data", ()))) for o in c.outputs} for c in code_of(notebook)]


each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


# Time is that of the processor, whatever else the machine does; the outer limit is for a notebook that hangs.
@pytest.mark.timeout(1200)
@each
def test_it_runs_without_a_warning_and_puts_out_what_is_committed(script: ModuleType, path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook = script.execute(path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert not script.warned(notebook)
    assert kinds_of(notebook) == kinds_of(nbformat.read(path, as_version=4))
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 1 < seconds < SECONDS


@each
def test_it_is_committed_as_a_run_leaves_it(script: ModuleType, path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == script.METADATA and not any(cell.metadata for cell in notebook.cells)
    assert [cell.execution_count for cell in code_of(notebook)] == list(range(1, len(code_of(notebook)) + 1))
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert path.stat().st_size < BYTES


@each
def test_it_names_no_path_of_the_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in code_of(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)
    text = nbformat.writes(notebook)
    assert not PATH.search(text), PATH.search(text)
    assert str(ROOT) not in text and str(Path.home()) not in text


@each
def test_its_links_lead_somewhere(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    links = [link for cell in notebook.cells if cell.cell_type == "markdown" for link in LINK.findall(cell.source)]
    local = [link.partition("#")[0] for link in links if not link.startswith("http")]
    assert local and all((path.parent / link).exists() for link in local)


def test_there_are_notebooks_and_what_they_warn_of_is_seen(script: ModuleType, tmp_path: Path) -> None:
    assert len(NOTEBOOKS) == 3
    cells = [nbformat.v4.new_code_cell("import sys, warnings; warnings.warn('look'); print(sys.executable)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    notebook = script.execute(tmp_path / "a.ipynb")
    assert "look" in script.warned(notebook)
    assert [output.text.strip() for output in notebook.cells[0].outputs if output.name == "stdout"] == [sys.executable]
