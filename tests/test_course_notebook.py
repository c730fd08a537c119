"""The students' notebook: it draws all with right functions, and says what it needs without."""

import os

import pytest

from course import release
from course.problems import read_modules, write_modules
from tests.test_course import put_solutions

pytestmark = pytest.mark.slow


def execute(folder, solved):
    """Of the notebook of a release with these problems solved: what each code cell prints, and how
    many pictures it draws."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    release.write_release(folder)
    write_modules(folder, put_solutions(read_modules(folder), solved))
    notebook = nbformat.read(folder / "course" / "student.ipynb", as_version=4)
    where = {"metadata": {"path": os.fspath(folder / "course")}}
    nbclient.NotebookClient(notebook, timeout=300, startup_timeout=120, resources=where).execute()
    printed = []
    pictures = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            streams = [out["text"] for out in cell.outputs if out.output_type == "stream"]
            shown = [out for out in cell.outputs if "image/png" in out.get("data", {})]
            printed.append("".join(streams))
            pictures.append(len(shown))
    return printed, pictures


def test_students_notebook_draws_their_functions(tmp_path):
    """With problems b, c and e it has all its pictures, and the floor is below every loss."""
    printed, pictures = execute(tmp_path, "bce")
    assert pictures == [0, 0, 1, 1, 1, 0, 1, 1]
    assert not any("Not yet" in text for text in printed)
    assert "<- lost" in printed[5]
    rows = [line.split() for line in printed[-1].splitlines() if line.startswith("from ")]
    assert [row[1] for row in rows] == ["svd", "asvd", "optimal"]
    assert all(float(times) > 1 for row in rows for times in row[2:])


def test_students_notebook_says_what_it_needs(tmp_path):
    """With only problem b, sections of c and e name the function that is missing, and no more."""
    printed, pictures = execute(tmp_path, "b")
    assert pictures == [0, 0, 1, 1, 0, 0, 0, 0]
    for text, letter in zip(printed[4:], "ccce", strict=True):
        assert text.startswith(f"Not yet. problem {letter}: ")
        assert len(text.splitlines()) == 1
