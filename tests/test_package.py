"""The package as a whole: layers, maps, public names, and that what is written of records is what they hold."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dslib
from dslib import records
from dslib.plots import frontier_points

FOLDER = Path(dslib.__file__).parent
# Lowest first: each module imports only from those before it (docs/decisions.md, "Modules").
LAYERS = [
    "errors",
    "records",
    "data",
    "algebra",
    "models",
    "sites",
    "merging",
    "shrinking",
    "training",
    "measuring",
    "profiling",
    "fitting",
    "finetuning",
    "calibrating",
    "ranking",
    "searching",
    "planning",
    "saving",
    "running",
    "compressing",
    "baselines",
    "plots",
    "bench",
    "cli",
    "__main__",
]


SOURCES = {file.relative_to(FOLDER): ast.parse(file.read_text()) for file in sorted(FOLDER.rglob("*.py"))}


def imports(file: Path) -> list[tuple[str, ...]]:
    """What a file imports of the rest of the package: paths of modules or names, from dslib on."""
    found = []
    for node in ast.walk(SOURCES[file]):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ("dslib", *file.parts)[: -node.level] if node.level else ()
            base = (*above, *(node.module or "").split(".")) if node.module else above
            found += [(*base, alias.name) for alias in node.names]
    return [path[1:] for path in found if path[0] == "dslib"]


def of(place: str) -> list[Path]:
    """The files of a package or top-level module."""
    return [file for file in SOURCES if file.parts[0] == place or (file.stem == place and len(file.parts) == 1)]


def test_every_module_has_its_layer():
    assert {m.name for m in pkgutil.iter_modules([str(FOLDER)])} == set(LAYERS)


def test_the_file_list_is_the_method():
    assert len(list(FOLDER.glob("*.py"))) <= 16


@pytest.mark.parametrize("place", LAYERS)
def test_modules_import_only_from_lower_layers(place):
    """Downwards only; so no two packages import each other either, and none but the command line all of dslib."""
    found = {path[0] if path else "dslib" for file in of(place) for path in imports(file)} - {place}
    assert found - ({"dslib"} if place == "cli" else set()) <= set(LAYERS[: LAYERS.index(place)])


def test_a_package_is_entered_by_its_map():
    """Its modules are private to it: from outside, only what its `__init__` names is imported."""
    for file in SOURCES:
        for path in imports(file):
            if path and path[0] != file.parts[0] and (FOLDER / path[0]).is_dir() and path[0] != "cli":
                assert len(path) == 2, f"{file} imports {'.'.join(path)}"
                assert hasattr(importlib.import_module(f"dslib.{path[0]}"), path[1]), f"{file}: {path}"


def test_functions_are_read_at_a_glance():
    """Under 80 lines without their docstrings; none hides behind a formatter that is switched off."""
    for file, tree in SOURCES.items():
        assert "fmt: " + "skip" not in (FOLDER / file).read_text(), file
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                told = node.body[0] if ast.get_docstring(node) else None
                lines = node.end_lineno - node.lineno + 1 - (told.end_lineno - told.lineno + 1 if told else 0)
                assert lines < 80, f"{file}: {node.name} has {lines} lines"


def test_records_need_no_torch():
    names = {a.name for n in ast.walk(SOURCES[Path("records.py")]) if isinstance(n, ast.Import) for a in n.names}
    assert "torch" not in names


def test_public_names_stay_callable_after_importing_every_submodule():
    """A module named like a function would shadow it."""
    for module in LAYERS:
        importlib.import_module(f"dslib.{module}")
    assert len(dslib.__all__) <= 32
    for name in dslib.__all__:
        found = getattr(dslib, name)
        assert callable(found), name
        assert inspect.getdoc(found), name


def test_a_name_that_is_none_is_refused():
    assert dslib.planning is importlib.import_module("dslib.planning")
    assert set(dslib.__all__) <= set(dir(dslib))
    with pytest.raises(AttributeError, match="'dslib' has no attribute 'serch'"):
        _ = dslib.serch
    with pytest.raises(ImportError, match="cannot import name 'serch'"):
        exec("from dslib import serch")


def test_the_command_lines_help_imports_nothing_heavy():
    code = """
import sys
from click.testing import CliRunner
from dslib.cli import app
for words in (["--help"], ["bench", "--help"], ["nothing"]):
    print(CliRunner().invoke(app, words).output)
print([name for name in ("torch", "numpy", "pandas") if name in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Stage 1: learn every site" in out
    assert "waterfall" in out
    assert out.splitlines()[-1] == "[]"


def test_the_package_can_be_run():
    done = subprocess.run([sys.executable, "-m", "dslib", "shrnk"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("dslib: No such command 'shrnk'")


def written(name: str) -> str:
    """A text of the project, lines joined."""
    return " ".join((FOLDER.parent / name).read_text().split())


@pytest.mark.parametrize("k", [12, 8])
def test_what_is_written_of_whole_runs_is_their_records(k):
    record = records.Record.load(FOLDER.parent / "data" / "results" / f"mobilenet_v2-imagenette-k{k}.json")
    merged, speed = record.values["networks"]["merged"], record.values["speedup"]
    row = (
        f"| {k} | {100 * merged['accuracy']:.1f} | {merged['macs'] / 1e6:.1f} | {merged['parameters'] / 1e6:.2f} "
        f"| {speed['ratio_of_medians']:.2f} ({speed['q25']:.2f}-{speed['q75']:.2f}) "
        f"| {sum(record.values['seconds'].values()) / 60:.0f} |"
    )
    results = written("docs/results.md")
    assert row in results
    original = record.values["networks"]["original"]
    assert f"| 17 (original) | {100 * original['accuracy']:.1f} | {original['macs'] / 1e6:.1f} |" in results
    assert record.values["top1_differences"] == 0
    assert record.values["largest_relative_difference"] < 1e-4


@pytest.mark.parametrize(
    ("name", "methods"), [("imagenette", "planner layers uniform depthshrinker"), ("cifar10", "layers planner")]
)
def test_what_is_written_of_the_frontiers_is_their_records(name, methods):
    record = records.Record.load(FOLDER.parent / "data" / "results" / f"frontier-{name}.json")
    grouped = frontier_points(record).dropna(subset=["accuracy"]).groupby(["method", "speedup"])
    accuracy, speed = 100 * grouped["accuracy"].mean(), grouped["measured_speedup"].mean()
    spread = (100 * grouped["accuracy"].std()).map(lambda value: f" ({value:.1f})" if value == value else "")
    for method in record.config["methods"]:
        told = [
            f"{accuracy[key]:.1f}{spread[key]} at {speed[key]:.2f}" if key in accuracy else "out of reach"
            for key in ((method, speedup) for speedup in record.config["speedups"])
        ]
        assert f"| {method} | {' | '.join(told)} |" in written("docs/results.md")
    for method in methods.split():
        said = rf"{accuracy[method, 1.5]:.1f} (% )?at {speed[method, 1.5]:.2f}"
        assert re.search(said, written("README.md")), said


def test_what_is_written_of_the_stored_networks_is_their_records():
    values = records.Record.load(FOLDER.parent / "data" / "results" / "networks.json").values
    rows = {row["network"]: row for row in values["rows"]}
    timed = {name: [timing for timing in values["timings"] if timing["network"] == name] for name in rows}
    fast = {name: [f"{timing['speedup']:.2f}" for timing in timed[name]] for name in rows}
    sizes = {name: f"{100 * row['accuracy']:.1f} | {row['macs'] / 1e6:.1f}" for name, row in rows.items()}
    readme, results = written("README.md"), written("docs/results.md")
    planned = rows["x1.5"]
    gone = len(planned["dropped"])
    merged, all_merged = len(planned["removed"]) - gone, len(rows["k8"]["removed"])
    assert f"| original | {sizes['original']} | 1 | 1 | 1 |" in readme
    eager, onnx, openvino = fast["k8"]
    assert f"sites kept, {all_merged} merged | {sizes['k8']} | {eager} | {onnx}* | {openvino} |" in readme
    assert f"8 sites keep {100 * rows['k8']['accuracy']:.1f} %" in results
    assert f"is {eager} times as fast in eager, {onnx} in ONNX Runtime" in results
    assert f"{openvino} in OpenVINO. Where blocks may be dropped too" in results
    eager, onnx, openvino = fast["x1.5"]
    row = f"{gone} blocks dropped, {merged} merged | {sizes['x1.5']} | {eager} | {onnx}* | {openvino} |"
    assert row in readme
    assert f"1.5 times as fast, {100 * planned['accuracy']:.1f} % are kept" in results
    done = f"{gone} blocks gone and {merged} merged, {eager}, {onnx} and {openvino} times as fast"
    assert f"{done} (record: `data/results/networks.json`)" in results
    for name in ("k8", "x1.5"):
        assert [timing["busy"] for timing in timed[name]] == [False, True, False]  # as is said there


def test_the_figure_of_the_readme_shows_its_record(monkeypatch):
    """Drawn anew, it has the same points, to half a pixel, and the same numbers in words."""
    docs = FOLDER.parent / "docs"
    monkeypatch.syspath_prepend(docs)
    for name, svg in importlib.import_module("draw").draw().items():
        stored = (docs / name).read_text()
        assert f'srcset="docs/{name}"' in written("README.md") or f'src="docs/{name}"' in written("README.md")
        told, points = (
            [re.findall(pattern, text) for text in (stored, svg)]
            for pattern in (r'aria-label="([^"]*)"', r'<use [^>]*x="([\d.]+)" y="([\d.]+)"')
        )
        assert told[0] == told[1]
        assert "ours: planned" in told[0][0]
        assert len(points[0]) == len(points[1]) > 15
        before, now = (np.array(found, float) for found in points)
        np.testing.assert_allclose(now, before, atol=0.5)


def test_the_readme_can_be_read_in_a_sitting():
    assert len((FOLDER.parent / "README.md").read_text().splitlines()) <= 120
