"""What a forward leaves behind, what fails while it is gathered, and files that do not fit."""

from __future__ import annotations

import pytest
import torch
from toy_sharded import Toy, config, equal, seeded, sharing, toy

from omni_group_coordinator import ParallelConfigError
from omni_hsdp import apply_hsdp_to_model, gathered, load_hsdp_model


def forwards():
    with sharing(2):
        model = apply_hsdp_to_model(toy(), config())
        for _ in range(20):
            model(seeded(2, 6))
        state = model._get_fsdp_state()
        groups = [m._get_fsdp_state()._fsdp_param_group for m in (model, *model.blocks)]
        return len(state._comm_ctx.post_forward_order), [
            len(g._post_forward_indices) for g in groups
        ]


def test_forwards_leave_no_records(ranks):
    assert ranks.run(forwards, world_size=2) == [(0, [0] * 4)] * 2


def received_for_the_root():
    """What torch received for the weights in no block, while the first of them computes."""
    with sharing(2):
        model, found = apply_hsdp_to_model(toy(), config()), []
        context = model._get_fsdp_state()._comm_ctx
        model.stem.register_forward_hook(lambda *_: found.append(context.all_gather_state))
        for _ in range(2):
            model(seeded(2, 6))
        return found


def test_what_was_received_is_not_kept_beside_the_weights(ranks):
    assert ranks.run(received_for_the_root, world_size=2) == [[None, None]] * 2


def fail_to_gather():
    x = seeded(2, 6)
    with sharing(2):
        model, expected = apply_hsdp_to_model(toy(), config()), toy()(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model.blocks[1]), "unshard", fails, raising=False)
            with pytest.raises(MemoryError), gathered(model):
                pass
        with gathered(model):
            inside = equal(model(x), expected)
        return inside, equal(model(x), expected), model._omni_hsdp.gatherer.gathered


def fails(*args, **kwargs):
    raise MemoryError


def test_a_model_that_could_not_be_gathered_works_later(ranks):
    assert ranks.run(fail_to_gather, world_size=2) == [(True, True, False)] * 2


def block_twice():
    with sharing(2):
        model, reference, x = toy(), toy(), seeded(2, 6)
        for each in (model, reference):
            each.blocks.append(each.blocks[0])
        apply_hsdp_to_model(model, config())
        return [equal(model(x), reference(x)) for _ in range(2)]


def test_a_block_may_stand_twice_in_a_list(ranks):
    assert ranks.run(block_twice, world_size=2) == [[True, True]] * 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_are_not_taken_for_numbers(tmp_path, dtype):
    files = pytest.importorskip("safetensors.torch")
    state = toy().state_dict()
    state["stem.weight"] = state["stem.weight"].to(dtype)
    files.save_file(state, tmp_path / "model.safetensors")
    with sharing(1), pytest.raises(ParallelConfigError, match=f"stem.weight is {dtype}.*float32"):
        load_hsdp_model(Toy, tmp_path, config())
