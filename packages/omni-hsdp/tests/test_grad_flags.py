"""Weights require a gradient in calls, as torch chooses kernels by it, and at no other time."""

from __future__ import annotations

import pytest
import torch
from toy_sharded import config, seeded, sharing, toy

from omni_hsdp import apply_hsdp_to_model, gathered, remove_hsdp


def flags_in_calls(mode):
    """Whether each parameter requires a gradient within the forward of its module."""
    model, x = toy(), seeded(2, 6)
    model.blocks[1].down.weight.requires_grad_(False)
    found = {}

    def note(module, _):
        found.update((names[id(module)] + n, p.requires_grad) for n, p in own(module))

    def own(module):
        return module.named_parameters(recurse=False)

    names = {id(module): f"{name}." for name, module in model.named_modules()}
    for module in model.modules():
        module.register_forward_pre_hook(note)
    with sharing(2):
        apply_hsdp_to_model(model, config(), ignored_modules=["head"])
        with mode():
            model(x)
            once = dict(found)
            with gathered(model):
                model(x)
        after = [p.requires_grad for p in model.parameters()]
        remove_hsdp(model)
        given_back = [n for n, p in model.named_parameters() if not p.requires_grad]
        return once == found, [n for n, flag in found.items() if not flag], any(after), given_back


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_have_the_flags_of_the_originals_in_calls_without_gradients(ranks, mode):
    frozen = ["blocks.1.down.weight"]
    for found in ranks.run(flags_in_calls, mode, world_size=2):
        assert found == (True, frozen, False, frozen)


def test_no_weight_requires_a_gradient_where_it_would_be_recorded(ranks):
    for alike, without, after, _ in ranks.run(flags_in_calls, torch.enable_grad, world_size=2):
        assert alike
        assert len(without) == len(list(toy().parameters()))
        assert not after
