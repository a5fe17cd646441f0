"""Every study runs, is drawn again from its record alone, and refuses what makes no sense."""

import dataclasses
import importlib
import json
import shlex
from pathlib import Path

import pytest
from rich.console import Console

import redraw
from records import read_json
from study import Ascending, Count, Distinct, Positive, Settings, Study, Work

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RECORDS = sorted(BENCHMARKS.glob("results/*/*.json"))
TINY = {
    "allocate": (
        "--times sqrt mixture --num-workers 3 5 --num-tasks 4 --num-iterations 20 --seeds 0 1 "
        "--process-tasks 6 --process-steps 4 --unit 0.001 --slowness 1 3"
    ),
    "broximal": "--norms Euclidean 'sum of entries' --num-steps 3 --solver-steps 50",
    "carried_rates": (
        "--networks cnn --rates 0.1 --num-steps 2 --batch-size 4 --width 16 --num-seeds 1"
    ),
    "compare": (
        "--budgets 3 5 --rates 0.02 0.05 --seeds 0 1 --methods muon drop_muon_uniform adamw "
        "--max-train 60 --num-validation 20 --batch-size 20 --channels 4 --num-evaluations 2 "
        "--predict"
    ),
    "communication": (
        "--methods muon drop_rank15_natural8 rank15_natural8_server --num-steps 4 --seeds 0 1 "
        "--num-evaluations 2 --rates 0.02 0.05 --width 16 --num-blocks 2 --num-heads 2 "
        "--context 8 --batch-size 2 --num-workers 2"
    ),
    "compiling": "--width 16 --blocks 2 --context 8 --batch-size 2 --turns 1 --rounds 2",
    "compression_time": (
        "--width 32 --num-heads 2 --context 8 --sequences 1 --num-workers 2 --turns 1"
    ),
    "counts": (
        "--subjects two_gradients leaves --networks mlp --widths 4 --batch-size 2 --repetitions 1 "
        "--leaf-shapes 4x8 --leaf-counts 1 2"
    ),
    "convergence_rates": (
        "--horizon 100 --num-seeds 2 --radii 0.3 --powers 4 --methods average MVR-2"
    ),
    "estimator_error": (
        "--problems quadratic --num-steps 4 --radii 0.01 0.1 --decays 0.9 --num-seeds 2"
    ),
    "orthogonalize": (
        "--lists 3x5 --updates 3x5 --others --rounds 1 --rate-sizes 16 --error-list 3x5 "
        "--conditions 10 --seeds 0"
    ),
    "small_graphs": (
        "--no-torch --graphs tiny mlp --widths 2 --batch-sizes 1 --at-once 2 --rounds 1"
    ),
    "prune": (
        "--seeds 0 --scores Wanda RIA --schemes '60 % per output' 2:4 --exchanges none "
        "'R²-DSnoT, sign' --width 8 --num-blocks 1 --context 8 --batch-size 2 --num-steps 2 "
        "--num-calibration 2 --num-eval-windows 2 --retrain-steps 2 --speed-width 8 "
        "--speed-blocks 1"
    ),
    "private": (
        "--dataset mnist5k --max-train 120 --num-validation 20 --num-clients 2 --rounds 4 "
        "--num-evaluations 2 --rates 0.1 0.3 --seeds 0 1"
    ),
    "processes": (
        "--num-workers 2 --width 16 --num-blocks 2 --num-heads 2 --context 8 --batch-size 2 "
        "--num-steps 7 --checkpoint-every 2 --kill-after 5"
    ),
    "smoothness": (
        "--max-train 30 --batch-size 10 --channels 2 --num-steps 4 --multipliers 1 "
        "--constant-radii 0.1 --seeds 1"
    ),
    "theory": (
        "--bounded cosh --bound-steps 4 --bound-runs 16 --problems 40 --candidates 200 "
        "--raced coupled --profiles rising --race-layers 2 --race-ratio 2 --race-runs 2 "
        "--race-steps 50 --channels 2 --max-train 20 --batch-size 10 --num-steps 4"
    ),
}


class Example(Settings):
    """Counts."""

    number: Count = 3
    """Up to here."""
    rates: Ascending[Positive] = (0.1, 0.2)
    """Of learning."""
    names: Distinct[str] = ("a", "b")
    """Of anything."""


def count_up(settings, work):
    return {"found": [work.part(f"part-{i}", lambda i=i: 1 / i) for i in range(1, settings.number)]}


EXAMPLE = Study("example", Example, count_up, lambda record: [f"{record['found']}"], lambda _: {})


def test_every_study_is_run_here():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py") if "STUDY = " in path.read_text()}
    assert set(TINY) == scripts


@pytest.mark.deep
@pytest.mark.parametrize("name", TINY)
def test_a_study_runs_and_is_drawn_again_from_its_record(name, tmp_path, capsys):
    study = importlib.import_module(name).STUDY
    study.main([*shlex.split(TINY[name]), "--output-dir", str(tmp_path)])
    path = tmp_path / f"{name}.json"
    said, text = capsys.readouterr().out, path.read_text()
    assert str(tmp_path) not in text
    pictures = sorted(tmp_path.glob("*.png"))
    assert pictures
    assert all(picture.name in said.replace("\n", "") for picture in pictures)
    for picture in pictures:
        picture.unlink()
    redraw.main((path,))
    again = capsys.readouterr().out
    assert said.endswith(again)
    assert sorted(tmp_path.glob("*.png")) == pictures
    assert path.read_text() == text


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_committed_records_are_drawn_without_running_anything(path, tmp_path):
    record = read_json(path)
    study = importlib.import_module(record["study"]).STUDY
    assert list(study.tables(record))
    drawn = {"_".join(filter(None, (study.name, name))) for name in study.figures(record)}
    kept = {picture.stem for picture in path.parent.glob("*.png")}
    assert kept <= drawn
    assert record["command"].startswith(f"python benchmarks/{study.name}.py")
    arguments = study.settings(output_dir=tmp_path, **record["settings"]).arguments()
    assert arguments | record["settings"] == arguments  # and maybe defaults of newer ones


def test_an_interrupted_study_goes_on(tmp_path):
    EXAMPLE.main(["--output-dir", str(tmp_path)])
    part = tmp_path / "parts" / "part-2.json"
    part.write_text(part.read_text().replace("0.5", "7.0"))
    EXAMPLE.main(["--output-dir", str(tmp_path)])
    assert read_json(tmp_path / "example.json")["found"] == [1.0, 7.0]


def test_a_study_may_be_extended(tmp_path):
    extended = dataclasses.replace(EXAMPLE, extending=("number",))
    for number in ("3", "4"):
        extended.main(["--output-dir", str(tmp_path), "--number", number])
    assert read_json(tmp_path / "example.json")["found"] == [1.0, 0.5, 1 / 3]


def test_parts_of_other_arguments_are_refused(tmp_path):
    EXAMPLE.main(["--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"number was 3, is 2.*--output-dir"):
        EXAMPLE.main(["--output-dir", str(tmp_path), "--number", "2"])


def test_a_record_says_how_it_is_made_without_folders(tmp_path):
    EXAMPLE.main(["--output-dir", str(tmp_path), "--number", "2"])
    record = read_json(tmp_path / "example.json")
    assert record["command"] == "python benchmarks/example.py --number 2 --output-dir results"
    assert record["settings"] == {"number": 2, "rates": [0.1, 0.2], "names": ["a", "b"]}
    assert record["environment"]["packages"]["jax"]


def test_what_is_not_finite_is_null(tmp_path):
    study = Study("x", Example, lambda *_: {"found": [float("inf")]}, lambda _: [], lambda _: {})
    study.main(["--output-dir", str(tmp_path)])
    assert json.loads((tmp_path / "x.json").read_text())["found"] == [None]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--number 0", "--number should be greater than or equal to 1, got 0"),
        ("--rates 0.2 0.1", "--rates should ascend, got (0.2, 0.1)"),
        ("--rates 0.1 inf", "--rates should be a finite number"),
        ("--rates", "--rates"),
        ("--names a a", "--names should not name a value twice"),
        ("--output-dir {file}", "--output-dir should be a folder, and is a file"),
    ],
)
def test_bad_arguments_are_refused_by_their_name(arguments, complaint, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    words = arguments.format(file=file).split()
    with pytest.raises(SystemExit):
        EXAMPLE.main(["--output-dir", str(tmp_path), *words])
    said = capsys.readouterr().err.replace("│", " ")
    assert complaint in " ".join(said.split())


def test_progress_is_said_in_a_file_too(tmp_path):
    with (tmp_path / "log").open("w") as file:
        with Work(Console(file=file), tmp_path, {}) as work:
            for item in work.track("abc", "looking"):
                assert item in "abc"
    assert "looking (1 of 3)" in (tmp_path / "log").read_text()


def test_what_is_no_record_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is no record"):
        redraw.main((tmp_path / "missing.json",))
