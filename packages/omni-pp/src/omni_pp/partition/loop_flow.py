"""What a loop over blocks hands from one iteration to the next, read from its source.

A chunk enters the loop at the iteration of the block before its first one, with what that block
returned. So this iteration, and all that comes later, may depend on nothing that earlier
iterations left behind except what the block returns.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from dataclasses import dataclass

_ONLY_SHAPES = frozenset({"shape", "size", "dtype", "device", "ndim", "dim"})


@dataclass(frozen=True)
class Flow:
    """What a loop's body sets.

    Attributes:
        carried: Names that the output of the block is assigned to.
        temporaries: Other names that the body sets, the block and its position included.
        problem: Why such a loop cannot be entered in its midst, or nothing.
    """

    carried: frozenset[str] = frozenset()
    temporaries: frozenset[str] = frozenset()
    problem: str = ""


def body_flow(loop: ast.For, block: str) -> Flow:
    """Reads the body of a loop over blocks."""
    stored = {name for statement in loop.body for kind, name, _ in events(statement) if kind == "s"}
    carried: set[str] = set()
    for statement in loop.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Assign) and _is_call_of(node.value, block):
                carried |= {one for target in node.targets for one in _names(target)}
    temporaries = stored - carried | set(_names(loop.target))
    if not carried:
        return Flow(problem="does not assign what a block returns")
    reader = _Body(block, frozenset(carried), frozenset(stored))
    reader.read(loop.body)
    return Flow(frozenset(carried), frozenset(temporaries), reader.problem)


class _Body:
    """Goes through the statements of a body, before and after the call of the block."""

    def __init__(self, block: str, carried: frozenset[str], stored: frozenset[str]) -> None:
        self.block, self.carried, self.stored = block, carried, stored
        self.ready: set[str] = set()  # set in this iteration, before the block is called
        self.called = False
        self.problem = ""

    def read(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if not self.problem:
                self._read_one(statement)

    def _read_one(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.If):
            self._check_reads(statement.test)
            self._read_branches(statement)
        elif isinstance(statement, ast.Assign | ast.AugAssign):
            self._read_assignment(statement)
        elif not isinstance(statement, ast.Pass):
            self.problem = f"does more than to call the block ({ast.unparse(statement)[:60]})"

    def _read_branches(self, statement: ast.If) -> None:
        before, called = set(self.ready), self.called
        self.read(statement.body)
        after, was_called = self.ready, self.called
        self.ready, self.called = before, called
        self.read(statement.orelse)
        self.ready, self.called = self.ready & after, self.called or was_called

    def _read_assignment(self, statement: ast.Assign | ast.AugAssign) -> None:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = {name for target in targets for name in _names(target)}
        if (
            any(not isinstance(one, ast.Name | ast.Tuple | ast.List) for one in targets)
            or not names
        ):
            self.problem = f"sets {ast.unparse(targets[0])}"
            return
        calls = _is_call_of(statement.value, self.block)
        self._check_reads(statement.value, calls=int(calls))
        if calls and self.called:
            self.problem = "calls a block more than once"
        elif calls:
            self.called = True
        elif names <= self.carried:
            pass
        elif self.called or isinstance(statement, ast.AugAssign):
            self.problem = (
                self.problem
                or f"hands on {min(names - self.carried)!r} besides what the block returns"
            )
        else:
            self.ready |= names - self.carried

    def _check_reads(self, node: ast.AST, calls: int = 0) -> None:
        known = self.carried if self.called else self.carried | self.ready
        read = [name for kind, name, _ in events(node) if kind == "l"]
        if read.count(self.block) > calls:  # even an attribute: the block may be on another rank
            text = ast.unparse(node)
            self.problem = self.problem or f"uses a block other than by calling it ({text[:60]})"
        for name in read:
            if name in self.stored - known and not self.problem:
                self.problem = f"hands on {name!r} besides what the block returns"


def later_reads(function: ast.AST, loop: ast.For, names: frozenset[str]) -> str:
    """One of the names that is read after the loop before it is set anew, or nothing."""
    return _first_read(_statements_after(function, loop), names, shapes_too=True)


def stale_reads(
    function: ast.AST,
    earlier: ast.For,
    later: ast.For,
    carried: tuple[frozenset[str], frozenset[str]],
) -> str:
    """A name that depends on the earlier loop and is read in or after the later one, or nothing.

    A chunk that begins in the later list has only the shapes of what the earlier list gives.
    """
    by_earlier, by_later = carried
    stale = set(by_earlier)
    between = [one for one in _statements_after(function, earlier) if one.lineno < later.lineno]
    for statement in between:
        for node in ast.walk(statement):
            if node is later or not isinstance(node, ast.Assign | ast.AugAssign):
                continue
            if later.lineno <= node.lineno:
                continue
            if any(k == "l" and n in stale and not shape for k, n, shape in events(node.value)):
                stale |= {name for kind, name, _ in events(node) if kind == "s"}
    stale -= by_later
    inside = _first_read(later.body, stale, shapes_too=False)
    return inside or _first_read(_statements_after(function, later), stale, shapes_too=False)


def _statements_after(function: ast.AST, loop: ast.For) -> list[ast.stmt]:
    """Those that can run after the loop, innermost first."""
    found: list[ast.stmt] = []
    for node in ast.walk(function):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if not isinstance(block, list):
                continue
            at = [i for i, one in enumerate(block) if any(n is loop for n in ast.walk(one))]
            if at and node is not loop:
                found = block[at[0] + 1 :] + found  # ast.walk goes from the outside in
    return found


def _first_read(statements: list[ast.stmt], names: Set[str], *, shapes_too: bool) -> str:
    names = set(names)
    for statement in statements:
        left = set(names)
        for kind, name, shape in events(statement):
            if kind == "l" and name in left and (shapes_too or not shape):
                return name
            if kind == "s":
                left.discard(name)
        if not isinstance(statement, ast.If | ast.For | ast.While | ast.Try):
            names = left  # what only a branch sets may be read after it as it was
    return ""


def events(node: ast.AST) -> Iterator[tuple[str, str, bool]]:
    """Reads ("l") and writes ("s") of names as they are evaluated; of reads, if of a shape only."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        yield "l", node.value.id, node.attr in _ONLY_SHAPES and isinstance(node.ctx, ast.Load)
        return
    if isinstance(node, ast.Name):
        yield "l" if isinstance(node.ctx, ast.Load) else "s", node.id, False
        return
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        yield "l", node.target.id, False
    for child in _in_order(node):
        yield from events(child)


def _in_order(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.Assign):
        return [node.value, *node.targets]
    if isinstance(node, ast.AugAssign | ast.NamedExpr):
        return [node.value, node.target]
    if isinstance(node, ast.For):
        return [node.iter, node.target, *node.body, *node.orelse]
    if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
        return [*node.generators, node.elt]
    if isinstance(node, ast.comprehension):
        return [node.iter, node.target, *node.ifs]
    return list(ast.iter_child_nodes(node))


def _is_call_of(node: ast.expr, block: str) -> bool:
    """``block(...)``, or an element of what it returns."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        node = node.value
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == block


def _names(target: ast.expr) -> list[str]:
    if isinstance(target, ast.Name):
        return [target.id]
    if isinstance(target, ast.Tuple | ast.List):
        return [name for one in target.elts for name in _names(one)]
    return []
