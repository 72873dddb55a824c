"""The house's rules: which package may import which, and how long a file may be."""

import ast

import pytest

from tests.conftest import ROOT

ALLOWED = {
    "data": {"data"},
    "launch": {"launch"},
    "configs": {"configs"},
    "ldm": {"ldm", "launch"},
    "detection": {"detection", "launch"},
}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    tops = {name.split(".")[0] for name in imported(path)}
    package = path.relative_to(ROOT).parts[0]
    assert tops & {*ALLOWED, "main", "tests"} <= ALLOWED[package]
    assert not tops & {"tensorflow", "torch"}
    entry = path.name == "__main__.py"
    assert "ml_collections" not in tops or package == "configs" or entry, "a config stops at the entrypoint"


@pytest.mark.parametrize("path", [*FILES, ROOT / "main.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400
    assert "utils" not in path.name
