"""A layer imports only lower layers, and optional packages only where they are needed."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from members import ROOT, Package, dependencies, read_packages, read_toml

PACKAGES = read_packages()

# Distributions whose import name is not their own name.
IMPORT_NAMES = {"pillow": "PIL"}

LINTER = "import sys; from importlinter.cli import lint_imports_command as main; main()"


def lint_imports(root: Path, *sources: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts; packages under ``sources`` go before the installed ones."""
    script = f"import sys; sys.path[:0] = {[str(path) for path in sources]!r}; {LINTER}"
    command = [sys.executable, "-c", script, "--no-cache", "--config", str(root / "pyproject.toml")]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_the_contracts_of_the_layers_hold():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("omni-group-coordinator", "omni_parallel_state"),
        ("omni-parallel-state", "omni_sp"),
        ("omni-sp", "omni_pp"),
        ("omni-sp", "omni_parallel"),
        ("omni-parallel", "omni_sp"),
        ("omni-sp", "numpy"),
        ("omni-sp", "rank_harness"),
    ],
)
def test_an_import_that_breaks_the_layers_is_found(tmp_path: Path, importer: str, imported: str):
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    package = PACKAGES[importer]
    copy = tmp_path / package.import_name
    shutil.copytree(package.source, copy, ignore=shutil.ignore_patterns("model", "__pycache__"))
    with (copy / "__init__.py").open("a") as file:
        file.write(f"\nimport {imported}\n")
    done = lint_imports(tmp_path, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{package.import_name} -> {imported}" in done.stdout


def imported_at_the_top(tree: ast.Module) -> Iterator[str]:
    """Yield the top-level packages imported when a module is, types-only imports left out."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        yield from imported_by(node)
        waiting += ast.iter_child_nodes(node)


def imported_by(node: ast.AST) -> Iterator[str]:
    """Yield the top-level packages that one statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    if isinstance(node, ast.ImportFrom) and not node.level:
        yield str(node.module).partition(".")[0]


def required(package: Package) -> set[str]:
    """Return what the package may import at the top of a module."""
    texts = read_toml(package.folder / "pyproject.toml")["project"]["dependencies"]
    return {import_name(text) for text in texts} | {package.import_name}


def optional(package: Package) -> set[str]:
    """Return what the package may import inside a function."""
    return {import_name(str(needed)) for needed in package.requirements}


def import_name(requirement: str) -> str:
    name = Requirement(requirement).name
    return IMPORT_NAMES.get(name, name.replace("-", "_"))


def modules(package: Package) -> list[tuple[str, ast.Module]]:
    """Return each module of the package as its path and its tree."""
    return [
        (path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(package.source.rglob("*.py"))
    ]


@pytest.mark.parametrize("name", list(PACKAGES))
def test_modules_import_at_the_top_only_what_the_package_declares(name: str):
    package = PACKAGES[name]
    allowed = required(package) | sys.stdlib_module_names
    found = {
        f"{path} imports {imported} at the top; import it in the function that needs it"
        for path, tree in modules(package)
        for imported in imported_at_the_top(tree)
        if imported not in allowed
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize("name", list(PACKAGES))
def test_what_is_imported_inside_a_function_is_declared_as_an_extra(name: str):
    package = PACKAGES[name]
    allowed = required(package) | optional(package) | sys.stdlib_module_names
    found = {
        f"{path} imports {imported}; name it in [project.optional-dependencies] of {name}"
        for path, tree in modules(package)
        for node in ast.walk(tree)
        for imported in imported_by(node)
        if imported not in allowed
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn", {"torch"}),
        ("from diffusers.models import x", {"diffusers"}),
        ("try:\n    import rich\nexcept ImportError:\n    pass", {"rich"}),
        ("class A:\n    import rich", {"rich"}),
        ("def f():\n    import diffusers", set()),
        ("if TYPE_CHECKING:\n    import diffusers\nelse:\n    import torch", {"torch"}),
        ("from . import x", set()),
    ],
)
def test_the_top_of_a_module_is_told_from_its_functions(source: str, expected: set[str]):
    assert set(imported_at_the_top(ast.parse(source))) == expected


def test_below_the_umbrella_torch_is_the_only_requirement():
    for package in PACKAGES.values():
        if package.name != "omni-parallel":
            assert required(package) - {package.import_name} == {
                "torch",
                *(name.replace("-", "_") for name in dependencies(PACKAGES, package.name)),
            }


def test_below_the_umbrella_nothing_needs_the_numpy_that_torch_can_do_without():
    calls = {
        f"{path}:{node.lineno}"
        for package in PACKAGES.values()
        if package.name != "omni-parallel"
        for path, tree in modules(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"numpy", "from_numpy"}
    }
    assert not calls
