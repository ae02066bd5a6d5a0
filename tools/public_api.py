"""Writes docs/api: the public names of each package with their signatures.

The files are committed, so that every change of what users may rely on is a line in a diff.
The sources are read, not imported. Public is what a module without an underscore in its path
lists in ``__all__`` (or, lacking that, defines itself under a name without one).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import griffe

from members import ROOT, Package, read_packages

Described = griffe.Object | griffe.Alias


def snapshot(package: Package) -> str:
    """Return the public names of a package, one line each, as text."""
    loader = griffe.GriffeLoader(search_paths=[package.folder / "src"])
    root = loader.load(package.import_name)
    loader.resolve_aliases(implicit=False, external=False)
    lines = [line for module in public_modules(root) for line in _module_lines(module)]
    return "\n".join([f"# Public API of {package.name}", *lines]) + "\n"


def public_modules(module: Described) -> Iterator[Described]:
    """Yield a module and the modules below it, leaving out names with an underscore."""
    yield module
    for name, member in sorted(module.members.items()):
        if not member.is_alias and member.is_module and not name.startswith("_"):
            yield from public_modules(member)


def _module_lines(module: Described) -> Iterator[str]:
    members = [(name, module.members[name]) for name in public_names(module)]
    if not members:
        return
    yield ""
    yield f"[{module.path}]"
    for name, member in members:
        yield from _member_lines(name, member)


def public_names(module: Described) -> list[str]:
    """Return the sorted public names of a module, modules below it left out.

    Raises:
        ValueError: ``__all__`` lists a name that the module does not have.
    """
    missing = [name for name in map(str, module.exports or ()) if name not in module.members]
    if missing:
        msg = f"{module.path}.__all__ lists {', '.join(missing)}, which the module does not have"
        raise ValueError(msg)
    return sorted(
        name
        for name, member in module.members.items()
        if _is_public(name, module) and (member.is_alias or not member.is_module)
    )


def _is_public(name: str, module: Described) -> bool:
    if module.exports is not None:
        return name in map(str, module.exports)
    return not name.startswith("_") and not module.members[name].is_alias


def _member_lines(name: str, member: Described, indent: str = "") -> Iterator[str]:
    if member.is_alias:
        target = _resolved(member)
        if target is None:
            yield f"{indent}{name} = {_target_path(member)}"
            return
        if not _has_private_part(target.path):
            yield f"{indent}{name} = {target.path}"
            return
        member = target
    yield f"{indent}{_described(name, member)}"
    if member.is_class:
        for inner, described in sorted(member.members.items()):
            if _is_member_public(inner) and not described.is_alias:
                yield from _member_lines(inner, described, f"{indent}  ")


def _resolved(alias: Described) -> Described | None:
    try:
        return alias.final_target if isinstance(alias, griffe.Alias) else alias
    except (griffe.AliasResolutionError, griffe.CyclicAliasError):
        return None  # a name of another package: its own snapshot describes it


def _target_path(member: Described) -> str:
    return member.target_path if isinstance(member, griffe.Alias) else member.path


def _has_private_part(path: str) -> bool:
    return any(part.startswith("_") for part in path.split("."))


def _is_member_public(name: str) -> bool:
    # Of the magic methods, these are what users write without naming them.
    return not name.startswith("_") or name in {"__init__", "__call__", "__enter__", "__getitem__"}


def _described(name: str, member: Described) -> str:
    if isinstance(member, griffe.Function):
        kinds = [kind for kind in ("staticmethod", "classmethod", "async") if kind in member.labels]
        return " ".join([*kinds, f"def {name}{_signature(member)}"])
    if isinstance(member, griffe.Class):
        bases = ", ".join(map(str, member.bases))
        decorators = [f"@{decorator.value}" for decorator in member.decorators]
        return " ".join([*decorators, f"class {name}({bases})".removesuffix("()")])
    if isinstance(member, griffe.Attribute):
        return _described_attribute(name, member)
    return f"{member.kind.value} {name}"


def _described_attribute(name: str, attribute: griffe.Attribute) -> str:
    annotation = f": {attribute.annotation}" if attribute.annotation is not None else ""
    if "property" in attribute.labels:
        return f"property {name}{annotation}"
    # How __init__ computes an attribute is nobody's business, and versions change by design.
    hidden = name == "__version__" or (
        "instance-attribute" in attribute.labels and "class-attribute" not in attribute.labels
    )
    value = "" if hidden or attribute.value is None else f" = {attribute.value}"
    return " ".join(f"{name}{annotation}{value}".split())


def _signature(function: griffe.Function) -> str:
    parameters: list[str] = []
    kind = griffe.ParameterKind
    previous: griffe.ParameterKind | None = None
    for parameter in function.parameters:
        if previous is kind.positional_only and parameter.kind is not previous:
            parameters.append("/")
        if parameter.kind is kind.keyword_only and previous not in (
            kind.keyword_only,
            kind.var_positional,
        ):
            parameters.append("*")
        parameters.append(_parameter(parameter))
        previous = parameter.kind
    returns = f" -> {function.returns}" if function.returns is not None else ""
    return f"({', '.join(parameters)}){returns}"


def _parameter(parameter: griffe.Parameter) -> str:
    stars = {
        griffe.ParameterKind.var_positional: "*",
        griffe.ParameterKind.var_keyword: "**",
    }.get(parameter.kind or griffe.ParameterKind.positional_or_keyword, "")
    annotation = f": {parameter.annotation}" if parameter.annotation is not None else ""
    default = "" if stars or parameter.default is None else f" = {parameter.default}"
    return f"{stars}{parameter.name}{annotation}{default}"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail when a file is stale.")
@click.option("--root", type=click.Path(path_type=Path), default=ROOT, hidden=True)
def main(root: Path, *, check: bool) -> None:
    """Write the snapshots, or check that those on disk are what would be written."""
    folder = root / "docs" / "api"
    packages = read_packages(root).values()
    files = {f"{package.import_name}.txt": snapshot(package) for package in packages}
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}
    stale = sorted(name for name in there.keys() | files if there.get(name) != files.get(name))
    if check and stale:
        msg = (
            f"stale in docs/api: {', '.join(stale)}; "
            "run `hatch run api` and look at the difference before committing it"
        )
        raise click.ClickException(msg)
    folder.mkdir(parents=True, exist_ok=True)
    for name in stale:
        if name in files:
            (folder / name).write_text(files[name], encoding="utf-8")
        else:
            (folder / name).unlink()
        click.echo(f"wrote docs/api/{name}" if name in files else f"removed docs/api/{name}")
    if not stale:
        click.echo(f"{len(files)} snapshots are up to date")


if __name__ == "__main__":
    main()
