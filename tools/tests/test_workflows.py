"""Each package has a workflow that starts for exactly what its tests depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

import workflows
from members import ROOT, affected, read_packages


def run(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(workflows.main, ["--root", str(root), *arguments])


def test_workflows_of_this_repository_are_up_to_date():
    result = run(ROOT, "--check")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", list(read_packages()))
def test_a_workflow_starts_exactly_when_its_package_is_affected(name):
    packages = read_packages()
    workflow = yaml.safe_load(workflows.render_package(packages, name))
    for event in ("push", "pull_request"):
        # YAML 1.1 reads the key `on` as true.
        paths = workflow[True][event]["paths"]
        starters = {other for other in packages if f"packages/{other}/**" in paths}
        assert starters == {
            other for other in packages if name in affected(packages, [f"packages/{other}/x"])
        }
    assert workflow["jobs"]["test"]["steps"][-1] == {"run": f"hatch run test {name}"}


def test_the_cross_package_workflow_always_starts():
    workflow = yaml.safe_load(workflows.render_cross_package())
    assert workflow[True] == {"push": {"branches": ["main"]}, "pull_request": None}
    commands = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"hatch run lint", "hatch run types", "hatch run test tests tools"} <= set(commands)


def test_what_compares_with_a_release_has_the_tags():
    jobs = yaml.safe_load(workflows.render_cross_package())["jobs"]
    for job in jobs.values():
        checkout, *steps = job["steps"]
        with_tags = {"run": "hatch run breaks"} in steps
        assert checkout.get("with", {}).get("fetch-depth", 1) == (0 if with_tags else 1)
    assert {"run": "hatch run breaks"} in jobs["checks"]["steps"]


def test_a_changed_dependency_makes_its_workflow_stale(copied_root: Path):
    assert run(copied_root).exit_code == 0
    assert run(copied_root, "--check").exit_code == 0
    pyproject = copied_root / "packages/omni-sp/pyproject.toml"
    text = pyproject.read_text()
    pyproject.write_text(text.replace("dependencies = [", 'dependencies = ["omni-pp>=0.1,<0.2",'))
    result = run(copied_root, "--check")
    assert result.exit_code == 1
    # The umbrella depends on omni-pp already.
    assert "stale in .github/workflows: omni-sp.yml;" in result.output
    run(copied_root)
    assert run(copied_root, "--check").exit_code == 0


@pytest.mark.parametrize("edit", ["changed", "removed"])
def test_a_workflow_edited_by_hand_is_stale(copied_root: Path, edit: str):
    run(copied_root)
    path = copied_root / ".github/workflows/omni-sp.yml"
    if edit == "removed":
        path.unlink()
    else:
        path.write_text(path.read_text().replace("ubuntu-latest", "ubuntu-20.04"))
    assert "omni-sp.yml" in run(copied_root, "--check").output


def test_the_workflow_of_a_package_that_is_gone_goes_too(copied_root: Path):
    run(copied_root)
    folder = copied_root / ".github/workflows"
    (folder / "omni-old.yml").write_text((folder / "omni-sp.yml").read_text())
    (folder / "by-hand.yml").write_text("name: by hand\n")
    assert run(copied_root, "--check").exit_code == 1
    run(copied_root)
    assert not (folder / "omni-old.yml").exists()
    assert (folder / "by-hand.yml").exists()
