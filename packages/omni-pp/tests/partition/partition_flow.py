"""Runs the chunks of all stages one after another in one process."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import Mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from omni_pp.partition import PartitionedModel, partition_model


def all_stages(model: nn.Module, stages: int, **options: Any) -> list[PartitionedModel]:
    """What each rank would have: every stage's part, of a copy of the model each."""
    return [
        partition_model(copy.deepcopy(model), stages, stage=stage, **options)
        for stage in range(stages)
    ]


def over_the_wire(tree: Any) -> Any:
    """As it arrives elsewhere: other memory, without the strides that it had."""
    return tree_map(lambda x: x.clone().contiguous() if isinstance(x, Tensor) else x, tree)


def run_chunks(parts: list[PartitionedModel], *args: Any, **kwargs: Any) -> Any:
    """Calls the model by its chunks; checks what each asks for and gives."""
    count = len(parts) * parts[0].virtual
    flow: Any = None
    with torch.no_grad():
        for index in range(count):
            part = parts[index % len(parts)]
            chunk = part.chunks[index // len(parts)]
            assert chunk.index == index
            receive, send = Mock(return_value=over_the_wire(flow)), Mock()
            result = chunk.run(part.model, args, kwargs, receive, send)
            assert receive.call_count == (index > 0)
            assert send.call_count == (index < count - 1)
            if index < count - 1:
                assert result is None
                (flow,) = send.call_args.args
    return result


def tensors_in(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors_in(value)]


def assert_equal(found: Any, expected: Any) -> None:
    """Bit for bit, and of the same type; what was expected says something."""
    assert type(found) is type(expected)
    pairs = list(zip(tensors_in(found), tensors_in(expected), strict=True))
    for one, other in pairs:
        assert other.isfinite().all()
        assert other.std() > 1e-3
        assert torch.equal(one, other)
    assert pairs
