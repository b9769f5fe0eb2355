"""The builder, on a course of one tiny lesson."""

import re
from pathlib import Path

import nbformat
import pytest

from pruning101.course import build, execute, material


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def cells(root, name="07_tiny.ipynb"):
    return nbformat.read(root / "notebooks" / name, as_version=4).cells


def test_building_again_changes_no_byte(built):
    before = files(built)
    build.build(material.find("tiny"))
    assert files(built) == before
    assert build.check(material.find("tiny")) == []


def test_stored_notebook_holds_nothing_of_the_run_but_its_results(built):
    text = (built / "notebooks" / "07_tiny.ipynb").read_text()
    assert "vnd.jupyter.widget" not in text
    assert "model_id" not in text
    assert '"widgets": {' not in text
    assert "noise" not in "".join(str(cell.outputs) for cell in cells(built) if "outputs" in cell)
    code = [cell for cell in cells(built) if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    results = [out for cell in code for out in cell.outputs if out.output_type == "execute_result"]
    assert results, "the tiny lesson shows a result"
    streams = [o for cell in code for o in cell.outputs if o.output_type == "stream"]
    assert streams[0].text == "step 0\nstep 1\nstep 2\n", "one stream, however many messages"
    assert {key for cell in cells(built) for key in cell.metadata} <= {
        "tags",
        "nbgrader",
        "mystnb",
        "jupyter",
    }
    assert [cell.id for cell in cells(built)] == [f"07-{i:03d}" for i in range(len(cells(built)))]


def test_only_solutions_are_folded_away(built):
    folded = [cell for cell in cells(built) if cell.metadata.get("jupyter")]
    assert [cell.metadata.nbgrader.grade_id for cell in folded] == ["ex-07-1"]
    assert "hide-input" in folded[0].metadata.tags


def test_compute_minutes_are_written_once_measured(built):
    header = build.header(nbformat.read(built / "notebooks" / "07_tiny.ipynb", 4), "tiny")
    assert header == build.Header(
        title="Cutting a tiny vector",
        reading="2",
        compute="half a minute",
        before="how to count to three",
        paper="Nobody, Tiny vectors (1988)",
    )
    assert "compute: about half a minute" in (built / "lessons" / "07_tiny.py").read_text()


@pytest.mark.parametrize(
    ("written", "seconds", "expected"),
    [
        ("? minutes", 3, "half a minute"),
        ("? minutes", 58, "1 minute"),
        ("? minutes", 89, "1.5 minutes"),
        ("1 minute", 40, "1 minute"),
        ("1 minute", 85, "1 minute"),  # one step of half a minute away: stays
        ("1 minute", 125, "2 minutes"),
        ("half a minute", 70, "half a minute"),
        ("half a minute", 95, "1.5 minutes"),
        ("3 minutes", 20, "half a minute"),
    ],
)
def test_minutes_move_only_by_more_than_half_a_minute(written, seconds, expected):
    text = f"# **Compute:** about {written} · more"
    assert build.with_minutes(text, seconds) == f"# **Compute:** about {expected} · more"


def test_text_is_made_anew_around_the_stored_outputs(built):
    source = built / "lessons" / "07_tiny.py"
    edit(
        source,
        "# ## Exercise 1",
        "# ## Exercise one\n#\n# With a text.\n\n# %% [markdown]\n# More.",
    )
    edit(source, "A line that rises from 0 to 2.", "A rising line.")
    edit(source, "how to count to three", "how to count")
    before = cells(built)
    build.reword(material.find("tiny"))
    assert build.check(material.find("tiny")) == []
    after = cells(built)
    assert len(after) == len(before) + 1
    assert [cell.outputs for cell in after if cell.cell_type == "code"] == [
        cell.outputs for cell in before if cell.cell_type == "code"
    ]
    assert "With a text." in (built / "notebooks" / "exercises" / "07_tiny.ipynb").read_text()
    assert "| how to count |" in (built / "notebooks" / "index.ipynb").read_text()


def test_text_that_did_not_change_stays_byte_for_byte(built):
    before = files(built)
    build.reword(material.find("tiny"))
    assert files(built) == before


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("np.arange(3)", "np.arange(4)", "`np.arange(4).sum() + len(PROFILE)` is not as it was"),
        ("# %%\nimport ipywidgets", "# %%\n1\n\n# %%\nimport ipywidgets", "`1` is not as"),
        ('"alt": "A line that rises from 0 to 2."', '"alt": ""', "without alt text"),
    ],
)
def test_outputs_of_other_code_are_not_taken_over(built, old, new, told):
    edit(built / "lessons" / "07_tiny.py", old, new)
    before = files(built)
    with pytest.raises(ValueError, match=re.escape(told)):
        build.reword(material.find("tiny"))
    assert files(built) == before


def test_index_has_a_row_a_lesson_and_keeps_those_to_come(built):
    text = (built / "lessons" / "index.py").read_text()
    row = (
        "| 07 | [Cutting a tiny vector](07_tiny.ipynb) ([exercises](exercises/07_tiny.ipynb))"
        " | Nobody, Tiny vectors (1988) | 2 min | half a minute | how to count to three |\n"
    )
    assert text.count("# | 07 |") == 1
    assert row in text
    assert "# | 08 | Not there yet |" in text
    assert row in "".join(cell.source for cell in cells(built, "index.ipynb"))


def test_index_gains_a_row_for_a_lesson_it_does_not_name(built):
    for folder, kind in (("lessons", "py"), ("notebooks", "ipynb")):
        source = built / folder / f"07_tiny.{kind}"
        (built / folder / f"09_new.{kind}").write_text(source.read_text())
    text = build.with_rows((built / "lessons" / "index.py").read_text(), built)
    assert re.findall(r"^# \| (\d\d) \|", text, re.MULTILINE) == ["07", "08", "09"]


def test_index_links_no_lesson_that_is_not_built(tree):
    text = (tree / "lessons" / "index.py").read_text()
    assert build.with_rows(text, tree) == text


def test_failing_cell_is_named_and_nothing_is_overwritten(built):
    edit(built / "lessons" / "07_tiny.py", 'print("profile  weights")', "print(1 / 0)")
    before = files(built)
    with pytest.raises(execute.CellFailed, match=r"07_tiny.*`print\(1 / 0\)`.*ZeroDivisionError"):
        build.build(material.find("tiny"))
    assert files(built) == before


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "notebook.ipynb"
    path.write_text("old")

    def full(self, text, **_):
        with open(self, "w") as file:
            file.write(text[:2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        execute.write(path, "new text")
    assert [item.name for item in tmp_path.iterdir()] == ["notebook.ipynb"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("where", "old", "new", "told"),
    [
        ("lessons/07_tiny.py", "## Exercise 1", "## Exercise one", "differs in its source"),
        ("lessons/07_tiny.py", 'tags=["table"]', 'tags=["tables"]', "differs in its metadata"),
        ("lessons/07_tiny.py", "# %%\n# A stream", "# A stream", "cells in the notebook"),
        ("notebooks/07_tiny.ipynb", '"id": "07-003"', '"id": "07-333"', "differs in its id"),
        ("notebooks/07_tiny.ipynb", '"language": "python"', '"language": "R"', "own metadata"),
        ("notebooks/07_tiny.ipynb", '"execution_count": 2', '"execution_count": null', "count"),
        ("notebooks/07_tiny.ipynb", "A line that rises from 0 to 2.", "", "alt text"),
        ("notebooks/exercises/07_tiny.ipynb", "YOUR CODE HERE", "Your code", "student version"),
    ],
)
def test_check_names_every_drift(built, where, old, new, told):
    edit(built / where, old, new)
    faults = build.check(material.find("tiny"))
    assert any(told in fault for fault in faults), faults


def test_check_sees_an_index_out_of_step(built):
    index = material.Lesson("index", built)
    assert build.check(index) == []
    edit(built / "lessons" / "07_tiny.py", "# Cutting a tiny vector", "# Another title")
    assert any("rows" in fault for fault in build.check(index))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("reading: 2 minutes", "short", "lacks `reading: 30 minutes`"),
        ("before: how to count", "count", "lacks `before: ...`"),
        ("cell_metadata_filter: tags,nbgrader,mystnb,-all", "x: 1", "cell_metadata_filter"),
        ('tags=["table"]', 'tags=["table"] slow=true', "metadata slow"),
        ('"ex-07-1-check-b"', '"ex-07-1-check-a"', "grade_id"),
        ('"points": 2, ', "", "lacks points"),
        pytest.param(
            'mystnb={"image": {"alt": "A line that rises from 0 to 2."}}',
            "",
            "without alt text",
            marks=pytest.mark.slow,  # it is executed first
        ),
        ("### END HIDDEN TESTS", "", "has no end"),
        ("    assert len(hidden) == 3", "print(hidden)", "check and must not show"),
    ],
)
def test_a_source_not_made_as_it_must_be_is_refused(tree, old, new, told):
    source = tree / "lessons" / "07_tiny.py"
    edit(source, old.strip(), new)
    before = files(tree)
    with pytest.raises(ValueError, match=re.escape(told)):
        build.build(material.find("tiny"))
    assert files(tree) == before


@pytest.mark.parametrize("name", ["tiny", "7", "07", "07_tiny", "TINY", "07_tiny.ipynb"])
def test_a_lesson_is_found_by_each_of_its_names(tree, name):
    assert material.find(name).name == "07_tiny"


def test_an_unknown_lesson_is_answered_with_the_nearest(tree):
    with pytest.raises(ValueError, match="'tinny': did you mean 07_tiny"):
        material.find("tinny")
    with pytest.raises(ValueError, match="there are 07_tiny"):
        material.find("xyz")
