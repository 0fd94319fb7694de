"""The chapters' sources: no typed results, every cell run, every module in the API, every chapter whole."""

import ast
import importlib
import json
import pkgutil
import re

import pytest
import yaml
from conftest import ROOT

import dslib

BOOK = ROOT / "book"
CHAPTERS = sorted(path for path in BOOK.glob("*") if path.suffix in (".ipynb", ".md"))
NAMES = [path.name for path in CHAPTERS]
# A number with a unit of a result. What is no result (a setting, a formula, arithmetic) stands in the list.
UNITS = r"%|(?:x\b|×)(?! ?\d)|images/s|(?:ms|s|seconds?|minutes?|hours?|[MG]|[kMG]i?B|points?|times)\b"
WORDS = "a|half a|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|sixteen|twenty|thirty"
IN_WORDS = rf"\b(?:{WORDS})(?: or \w+)?(?: and a half)? (?:points?|per ?cent)\b|\b\d+ (?:of|in) 100\b"
RESULT = re.compile(rf"(?<![\w.^-])\d[\d,.]*\*{{0,2}}\s?(?:{UNITS})|{IN_WORDS}", re.IGNORECASE)
ALLOWED = (ROOT / "tests" / "typed_numbers.txt").read_text().splitlines()
LEARNING = (
    "why_dense",
    "three_stages",
    "which_activations",
    "getting_accuracy_back",
    "merging_is_exact",
    "no_training_set",
    "the_trade_off",
    "shrink_your_own",
    "in_your_browser",
    "imagenet_scale",
)


def prose(path) -> list[str]:
    """The text of a chapter, captions too, without code blocks."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        texts += [cell["metadata"]["mystnb"]["figure"]["caption"] for cell in cells if "mystnb" in cell["metadata"]]
    else:
        texts = [path.read_text()]
    return [without_code(text) for text in texts]


def without_code(text: str) -> str:
    """A text without its code blocks; what stands in a directive stays."""
    kept, fence = [], ""
    for line in text.splitlines():
        if line.startswith("```"):
            fence = "" if fence else line
        elif not fence or fence.startswith("```{"):
            kept.append(line)
    return "\n".join(kept)


def typed(text: str) -> list[str]:
    """Each number with a unit, and the words around it."""
    flat = " ".join(text.split())
    return [flat[max(0, found.start() - 30) : found.end() + 20] for found in RESULT.finditer(flat)]


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_no_result_is_typed_into_prose(path):
    allowed = [line.partition(": ")[2] for line in ALLOWED if line.startswith(f"{path.stem}: ")]
    found = [words for text in prose(path) for words in typed(text)]
    assert [words for words in found if not any(part in words for part in allowed)] == []
    assert [part for part in allowed if not any(part in words for words in found)] == []  # nothing stale


def test_a_typed_result_is_seen():
    assert typed("it keeps 92.8 % of them") == ["it keeps 92.8 % of them"]
    assert len(typed("1.2 x, 3 ms, 10,804 images/s and 415 M; 1.27×, 12 s, 3 hours, 25 MB, 2.1 GiB, **92.8** %")) == 10
    assert len(typed("A point and a half, six points or more, about 91 of 100, five per cent")) == 4
    text = "```{literalinclude} x\n```\n92.8 % of them\n```bash\nsleep 3 s\n```\nand 3 ms"
    assert len(typed(without_code(text))) == 2
    assert typed("k = 8 of 17 sites, 128 px, a 3x3 kernel, $x^2$, in 2022") == []


@pytest.mark.parametrize("path", [path for path in CHAPTERS if path.suffix == ".ipynb"], ids=lambda path: path.name)
def test_every_cell_was_run_in_order_and_none_failed(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not {"raises-exception", "nbval-skip", "remove-output"} & {
        t for c in cells for t in c["metadata"].get("tags", ())
    }


@pytest.mark.parametrize("path", [path for path in CHAPTERS if path.suffix == ".ipynb"], ids=lambda path: path.name)
def test_every_figure_has_a_caption_and_a_text_in_its_place(path):
    for cell in json.loads(path.read_text())["cells"]:
        drawn = [kind for output in cell.get("outputs", ()) for kind in output.get("data", ()) if "image" in kind]
        told = cell["metadata"].get("mystnb", {})
        assert bool(drawn) == bool(told), cell["id"]
        if told:  # the caption would stand below every table too
            assert ["data" in output for output in cell["outputs"]].count(True) == 1, cell["id"]
            assert told["figure"]["caption"].endswith(".")
            assert len(told["image"]["alt"]) > 20


@pytest.mark.parametrize("name", LEARNING)
def test_a_chapter_has_its_parts(name):
    (path,) = [path for path in CHAPTERS if path.stem == name]
    text = "\n".join(prose(path))
    for part in ("**Question.**", "**Idea in a picture.**", "Try this", "**Exercise.**", ":::{dropdown} Solution"):
        assert part in text, part
    assert "what you should see" in text.lower()


def test_every_page_is_in_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    entries = [{"file": toc["root"]}, *toc["chapters"], *(s for c in toc["chapters"] for s in c.get("sections", ()))]
    assert sorted(entry["file"] for entry in entries) == sorted(f"book/{path.stem}" for path in CHAPTERS)


def test_the_api_describes_every_module(monkeypatch):
    """The page is made of the packages' maps; what a chapter names is on it or on the page before."""
    monkeypatch.syspath_prepend(BOOK / "_ext")
    maps = importlib.import_module("package_maps")
    source = [(BOOK / "modules.md").read_text()]
    maps.write_page(None, maps.PAGE, source)
    modules = {found.name for found in pkgutil.iter_modules(dslib.__path__)} - {"cli", "__main__"}
    assert set(re.findall(r"py:module:: dslib\.(\w+)\n", source[0])) == modules
    described = re.findall(r"auto(?:class|function):: (\S+)", source[0])
    tables = re.findall(r"py:data:: (\S+)\n   :module: (\S+)", source[0])
    described += [f"{module}.{name}" for name, module in tables]
    assert len(described) == len(set(described)) > 150
    named = {name for path in CHAPTERS for text in prose(path) for name in re.findall(r"`(dslib(?:\.\w+)+)", text)}
    known = {*described, *(f"dslib.{name}" for name in dslib.__all__), *(f"dslib.{name}" for name in modules)}
    assert named - {"dslib.records.Record"} <= known


def code_of(path) -> ast.Module:
    """A chapter's cells as one program."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return ast.parse("\n".join("".join(cell["source"]) for cell in cells))


@pytest.mark.parametrize("path", [path for path in CHAPTERS if path.suffix == ".ipynb"], ids=lambda path: path.name)
def test_chapters_are_thin(path):
    """What a chapter does is in the package: no function of more than five lines, imports from the packages' maps."""
    for node in ast.walk(code_of(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.end_lineno - node.lineno < 5, node.name
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dslib"):
            assert node.module.count(".") <= 1, node.module
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("dslib.") for name in node.names)


@pytest.mark.parametrize("path", sorted(BOOK.glob("_ext/*.py")), ids=lambda path: path.name)
def test_what_builds_the_book_imports_what_is_there(path):
    """Also within functions: a lab that cannot be exported is told in a line that a reader of the log may miss."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dslib"):
            assert all(hasattr(importlib.import_module(node.module), name.name) for name in node.names)
