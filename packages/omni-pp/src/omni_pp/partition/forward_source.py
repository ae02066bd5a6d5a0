"""Reads the source of a forward: over which lists it loops, and whether these can be cut."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass, field
from itertools import pairwise

from omni_pp.partition.loop_flow import Flow, body_flow, later_reads, stale_reads

_LOOPS = (ast.For, ast.AsyncFor, ast.While)


@dataclass
class Loop:
    """A loop over a list of modules.

    Attributes:
        name: Dotted path of the list.
        node: The loop; without the branch for gradient checkpointing.
        problem: Why its form alone forbids to shorten the list, or nothing.
        flow: What its body hands from block to block, and why that forbids it, or nothing.
    """

    name: str
    node: ast.For
    problem: str
    flow: Flow = field(default_factory=Flow)


@dataclass(frozen=True)
class Trunk:
    """The loops of a forward, in order.

    Attributes:
        function: The forward, without its branches for gradient checkpointing.
        loops: Its loops over modules.
        misused: Lists that are used outside of loops too.
    """

    function: ast.FunctionDef
    loops: tuple[Loop, ...]
    misused: frozenset[str]

    @property
    def order(self) -> tuple[str, ...]:
        """The lists that are looped over, each once."""
        return tuple(dict.fromkeys(loop.name for loop in self.loops))

    def refusal(self, chosen: tuple[str, ...]) -> str:
        """Why these lists cannot be cut, or nothing."""
        trunk = [loop for loop in self.loops if loop.name in chosen]
        for loop in trunk:
            if reason := loop.problem or loop.flow.problem:
                return f"its forward {reason} in the loop over {loop.name}"
            if sum(other.name == loop.name for other in trunk) > 1:
                return f"its forward loops over {loop.name} more than once"
            if loop.name in self.misused:
                return f"its forward uses {loop.name} other than in a loop over it"
            left = later_reads(self.function, loop.node, loop.flow.temporaries)
            if left:
                return f"its forward reads {left!r} after the loop over {loop.name} that sets it"
        for earlier, later in pairwise(trunk):
            stale = stale_reads(self.function, earlier.node, later.node, trunk_flows(trunk, later))
            if stale:
                return (
                    f"its forward reads {stale!r}, which the loop over {earlier.name} gave, in or "
                    f"after that over {later.name}"
                )
        return ""


def trunk_flows(trunk: list[Loop], later: Loop) -> tuple[frozenset[str], frozenset[str]]:
    """What the loops before one hand on, and what that one does."""
    earlier = trunk[: trunk.index(later)]
    carried = frozenset(name for loop in earlier for name in loop.flow.carried)
    return carried, later.flow.carried


def read_forward(owner: type) -> Trunk | None:
    """The loops of a class's forward over modules; None where there is no source."""
    forward = inspect.unwrap(vars(owner)["forward"])
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    function = _WithoutCheckpointing().visit(tree).body[0]
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return None
    instance = function.args.args[0].arg
    loops: list[Loop] = []
    recognised: set[int] = set()
    _collect(function, instance, inside=False, loops=loops, recognised=recognised)
    named = {loop.name for loop in loops}
    misused = {
        path
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and id(node) not in recognised
        if (path := _path(node, instance)) in named
    }
    return Trunk(function, tuple(loops), frozenset(misused))


class _WithoutCheckpointing(ast.NodeTransformer):
    """Drops what runs only where gradients are taken."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        if _is_for_checkpointing(node.test):
            return node.orelse or [ast.copy_location(ast.Pass(), node)]
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        return node.orelse if _is_for_checkpointing(node.test) else node


def _is_for_checkpointing(test: ast.expr) -> bool:
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return any(
        isinstance(part, ast.Attribute) and part.attr == "gradient_checkpointing" for part in parts
    )


def _collect(
    node: ast.AST, instance: str, *, inside: bool, loops: list[Loop], recognised: set[int]
) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.For) and (found := _loop(child, instance, recognised)):
            if inside:
                found.problem = found.problem or "has another loop around it"
            loops.append(found)
        _collect(
            child,
            instance,
            inside=inside or isinstance(child, _LOOPS),
            loops=loops,
            recognised=recognised,
        )


def _loop(node: ast.For, instance: str, recognised: set[int]) -> Loop | None:
    """The loop, where it is one over a list of the model in a form that is known."""
    over, target = node.iter, node.target
    if isinstance(over, ast.Call) and isinstance(over.func, ast.Name):
        listed = [one for one in over.args if _path(one, instance)]
        if over.func.id == "zip" and listed:
            recognised.add(id(listed[0]))
            return Loop(_path(listed[0], instance), node, "zips blocks with something else")
        if over.func.id != "enumerate" or not listed:
            return None
        over = listed[0]
        index, target = _pair(target)
        problem = "uses the position of a block" if index is None else ""
        if index and any(isinstance(n, ast.Name) and n.id == index for n in _body_nodes(node)):
            problem = "uses the position of a block"
    else:
        problem = ""
    if not (name := _path(over, instance)):
        return None
    recognised.add(id(over))
    if not isinstance(target, ast.Name):
        return Loop(name, node, problem or "unpacks what is in the list")
    return Loop(name, node, problem, body_flow(node, target.id))


def _pair(target: ast.expr) -> tuple[str | None, ast.expr]:
    """The names of position and block; no name where they are not unpacked."""
    if isinstance(target, ast.Tuple) and isinstance(target.elts[0], ast.Name):
        return target.elts[0].id, target.elts[1]
    return None, target


def _body_nodes(loop: ast.For) -> list[ast.AST]:
    return [node for statement in loop.body for node in ast.walk(statement)]


def _path(node: ast.AST, instance: str) -> str:
    """``"a.b"`` of ``self.a.b``; nothing for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == instance else ""
