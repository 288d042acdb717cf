"""Lessons are short, run as a script and as a notebook, and learn; their committed notebooks are up to date."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jupytext", reason="needs jupytext")
pytest.importorskip("nbclient", reason="needs nbclient")
pytest.importorskip("ipykernel", reason="needs ipykernel")

import nbformat

from tfops_testing.models_data import draw_arrays, run_in
from tfops_testing.notebooks import LESSONS, METADATA, convert, execute
from tfops_testing.paths import MODELS, ROOT
from trainer import alexnet_keras, mnist_keras

pytestmark = pytest.mark.source_tree

LINES = {"mnist_graph": 150, "mnist_keras": 80, "alexnet_keras": 120}
OTHER_LINES = 240
NOTEBOOK_BYTES = 400_000

NETWORKS = {
    "mnist_graph": mnist_keras.build_model,
    "mnist_keras": mnist_keras.build_model,
    "alexnet_graph": lambda: alexnet_keras.build_model(67, 10, 0.25),
    "alexnet_keras": lambda: alexnet_keras.build_model(67, 10, 0.25),
}

lessons = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)

# Counts a lesson's parameters as Keras does, with batch norm's moving averages.
COUNT = """
if "model" in globals():
    count = model.count_params()
else:
    moving = [each for each in v1.global_variables() if "/moving_" in each.name]
    count = sum(each.shape.num_elements() for each in [*v1.trainable_variables(), *moving])
print(count, "parameters in all")
"""


@pytest.fixture(scope="module")
def variables(tmp_path_factory) -> dict[str, str]:
    """Environment variables with which a lesson takes seconds."""
    path = tmp_path_factory.mktemp("digits") / "mnist.npz"
    np.savez(path, **draw_arrays(1200, 300))
    return {"TFOPS_MNIST": str(path), "LESSON_QUICK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


@lessons
def test_lesson_is_short(lesson):
    assert len(lesson.read_text().splitlines()) <= LINES.get(lesson.stem, OTHER_LINES)


@lessons
def test_lesson_has_answers_and_a_place_in_the_index(lesson):
    assert f"[answers/{lesson.stem}.md](answers/{lesson.stem}.md)" in lesson.read_text()
    assert (MODELS / "answers" / f"{lesson.stem}.md").is_file()
    number = re.match(r"# %% \[markdown\]\n# # (\d)\. \w", lesson.read_text())[1]
    assert f"\n| {number} | [{lesson.stem}]({lesson.name}) |" in (MODELS / "README.md").read_text()


@lessons
def test_notebook_runs(lesson, variables, tmp_path):
    """The first four train networks of the trainer: as many parameters, and MNIST's learn the digits."""
    notebook = convert(lesson)
    network = NETWORKS.get(lesson.stem)
    if network:
        notebook.cells.append(nbformat.v4.new_code_cell(COUNT))
    execute(notebook, tmp_path, **variables)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    shown = sum("image/png" in output.get("data", {}) for output in outputs)
    assert shown == len(list((tmp_path / "runs" / "lessons" / lesson.stem).glob("*.png"))) > 0
    if network:
        printed = "".join(output.get("text", "") for output in outputs)
        assert f"\n{network().count_params()} parameters in all\n" in printed
        if lesson.stem.startswith("mnist"):
            assert float(re.findall(r"[Tt]est accuracy:? ([\d.]+)%", printed)[-1]) > 85


@pytest.mark.parametrize(
    "lesson",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem == "mnist_keras" else pytest.mark.slow)
        for path in LESSONS
    ],
)
def test_script_runs_and_names_its_pictures(lesson, variables, tmp_path):
    """Its code is the notebook's: the test of one script is enough for every day."""
    done = run_in(tmp_path, lesson, timeout=600, **variables)
    assert done.returncode == 0, done.stderr
    names, folder = re.search(r"^Pictures: (.+\.png) in (.+)$", done.stdout, re.MULTILINE).groups()
    assert names.split() == sorted(path.name for path in (tmp_path / folder).glob("*.png"))


@lessons
def test_committed_notebook_is_of_the_lessons_text(lesson):
    """If this fails: make notebooks."""
    path = lesson.with_suffix(".ipynb")
    assert path.stat().st_size < NOTEBOOK_BYTES
    text = path.read_text()
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    committed, wanted = nbformat.reads(text, as_version=4), convert(lesson)
    assert committed.metadata == METADATA
    assert [(cell.cell_type, cell.id, cell.source) for cell in committed.cells] == [
        (cell.cell_type, cell.id, cell.source) for cell in wanted.cells
    ]
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    assert code[-1].outputs
