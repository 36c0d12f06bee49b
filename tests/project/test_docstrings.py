"""Docstrings of the library: what ruff cannot see. Shapes of arrays, errors that are raised, examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs
ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path for package in ("pipeline", "serve", "jobs") for path in (ROOT / package).rglob("*.py"))
LIBRARY = [path for path in MODULES if path.parent.name != "jobs"]
Function = ast.FunctionDef | ast.AsyncFunctionDef
_ARRAYS = re.compile(r"\b(Array|Floats|Ints|Samples|NDArray|Tensor|Rows)\b")
_SHAPES = re.compile(r"\([^()]*,[^()]*\)|\(\w+\)|of any shape")
_BUGS = {"NotImplementedError", "AssertionError", "TypeError", "ValueError", "KeyError"}  # a caller's, not a user's


def public(tree: ast.Module) -> Iterator[tuple[Function, str]]:
    """Public functions and methods, each with its docstring and its class's."""
    for node in tree.body:
        if isinstance(node, Function):
            yield node, ast.get_docstring(node) or ""
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            of_class = ast.get_docstring(node) or ""
            for member in node.body:
                if isinstance(member, Function):
                    yield member, f"{ast.get_docstring(member) or ''}\n{of_class}"


def documented() -> list[tuple[str, Function, str]]:
    found = []
    for path in LIBRARY:
        for function, text in public(ast.parse(path.read_text(encoding="utf-8"))):
            if not function.name.startswith("_"):
                found.append((f"{path.relative_to(ROOT)}:{function.lineno} {function.name}", function, text))
    return found


def test_the_scanner_sees_the_library() -> None:
    names = {place.split()[1] for place, _, _ in documented()}
    assert len(names) > 200
    assert {"load_middle", "log_mel", "predict", "evaluate", "create_app"} <= names


def test_arrays_have_shapes() -> None:
    missing = []
    for place, function, text in documented():
        annotations = [*(argument.annotation for argument in function.args.args), function.returns]
        arrays = any(_ARRAYS.search(ast.unparse(annotation)) for annotation in annotations if annotation)
        if arrays and function.name != "forward" and not _SHAPES.search(text):
            missing.append(place)
    assert not missing


def test_errors_that_a_user_can_cause_are_told() -> None:
    missing = []
    for place, function, text in documented():
        raised = {
            ast.unparse(node.exc.func)
            for node in ast.walk(function)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        }
        ours = {name for name in raised if name.endswith("Error") and not name.startswith("_")} - _BUGS
        if ours and not re.search(r"Raises:|[Rr]efuse|Errors as|errors as|Raise ", text):
            missing.append(f"{place}: {sorted(ours)}")
    assert not missing


WITH_EXAMPLES = [path for path in MODULES if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings_run(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name.removesuffix(".__init__"))
    result = doctest.testmod(module, raise_on_error=False)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("package", sorted(path.parent.name for path in ROOT.glob("pipeline/*/__init__.py")))
def test_what_a_package_says_to_start_with_exists(package: str) -> None:
    text = importlib.import_module(f"pipeline.{package}").__doc__ or ""
    names = re.findall(r"``([\w.]+)``", text.split("Start with:")[1])
    assert names
    for name in names:
        pkgutil.resolve_name(f"pipeline.{package}.{name}")
