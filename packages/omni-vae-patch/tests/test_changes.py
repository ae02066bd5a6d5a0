"""What one rank is given or changes alone, and what is changed while an autoencoder is parallel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from small_vaes import SmallVae, error, everyone, random, text_of
from stock_autoencoders import CASES
from torch import Tensor, nn

from omni_vae_patch import VaeParallelConfig, parallelize_vae
from omni_vae_patch.spatial import shard, sharded_call

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
EXACT = VaeParallelConfig("exact", verify=False)
Z = random(1, 4, 7, 5)

OTHERS: dict[str, Callable[[Any], Any]] = {
    "another size": lambda vae: vae.decode(random(1, 4, 9, 5)),
    "no batch": lambda vae: vae.decode(Z[0]),
    "other channels": lambda vae: vae.decode(Z[:, :3]),
    "nothing": lambda vae: vae.decode(None),
    "another dtype": lambda vae: vae.decode(Z.double()),
    "another batch": lambda vae: vae.decode(torch.cat([Z, Z])),
    "another method": lambda vae: vae.encode(random(1, 3, 8, 8)),
    "another argument": lambda vae: vae.decode(Z, more=1),
}


@torch.no_grad()
def one_rank_asks_for_something_else() -> list[Any]:
    vae, group = SmallVae(), everyone()
    alone, found = vae.decode(Z), []
    with parallelize_vae(vae, EXACT, group=group):
        for other in OTHERS.values():
            call = other if group.rank_in_group == 1 else lambda vae: vae.decode(Z)
            found.append((text_of(lambda call=call: call(vae)), error(vae.decode(Z), alone)))
    return found


def test_what_one_rank_alone_is_given_is_an_error_on_all(ranks):
    for found in ranks.run(one_rank_asks_for_something_else, timeout=40):
        for name, (text, off) in zip(OTHERS, found, strict=True):
            assert text.split(":")[0].endswith("Error"), name
            assert off <= 1e-5, name


class FailsOnce:
    """A function that runs out of memory the first time."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            msg = "no room"
            raise torch.OutOfMemoryError(msg)
        return self.original(*args, **options)


@torch.no_grad()
def out_of_memory_between_modules() -> list[Any]:
    """Where the result is joined, and within an exchange."""
    vae, group = SmallVae(), everyone()
    alone, found, me = vae.decode(Z), [], group.rank_in_group
    with parallelize_vae(vae, EXACT, group=group):
        for module, name in ((sharded_call.torch, "empty"), (shard, "post_halo")):
            with pytest.MonkeyPatch.context() as patch:
                if me == 1:
                    patch.setattr(module, name, FailsOnce(getattr(module, name)))
                found.append(text_of(lambda: vae.decode(Z)))
            found.append(error(vae.decode(Z), alone))
    return found


def test_out_of_memory_between_modules_is_raised_on_all(ranks):
    for joining, off, exchanging, again in ranks.run(out_of_memory_between_modules, timeout=40):
        assert joining.split(":")[0].endswith("OutOfMemoryError")
        assert exchanging.split(":")[0].endswith("OutOfMemoryError")
        assert max(off, again) <= 1e-5


@torch.no_grad()
def on_another_device() -> list[Any]:
    """Of the latent on one rank, whose messages would take another backend; and an empty one."""
    vae, group = SmallVae(), everyone()
    alone = vae.decode(Z)
    with parallelize_vae(vae, EXACT, group=group):
        odd = Z.to("meta") if group.rank_in_group == 1 else Z
        said = [text_of(lambda: vae.decode(odd)), text_of(lambda: vae.decode(Z[:0]))]
        return [*said, error(vae.decode(Z), alone)]


def test_a_latent_on_another_device_and_an_empty_one_are_refused_on_all(ranks):
    for place, empty, off in ranks.run(on_another_device, timeout=40):
        assert place.startswith("RankMismatchError")
        assert "'cpu'" in place
        assert "'meta'" in place
        assert ", which is empty; this autoencoder decodes" in empty
        assert off <= 1e-5


def one_rank_objects() -> list[str]:
    """To a module that it alone has, in both modes that look at modules."""
    group = everyone()
    found = []
    for mode in ("exact", "auto"):
        extra = nn.InstanceNorm2d(8) if group.rank_in_group == 1 else nn.Identity()
        config = VaeParallelConfig(mode, verify=True)
        found.append(
            text_of(lambda e=extra, c=config: parallelize_vae(SmallVae(e), c, group=group))
        )
    return found


def test_a_module_that_one_rank_alone_has_is_an_error_on_all(ranks):
    for exact, auto in ranks.run(one_rank_objects, timeout=40):
        assert exact.startswith("ParallelConfigError")
        assert "InstanceNorm2d" in exact
        assert auto.startswith("ParallelConfigError")  # it knows no tiles either


@torch.no_grad()
def changed_while_applied() -> list[str]:
    group, found = everyone(), []
    case = CASES["kl"]
    z = case.latent(4, 4, 1)
    changes: list[Callable[[Any], Any]] = [
        lambda vae: vae.fuse_qkv_projections(),
        lambda vae: setattr(vae.decoder.mid_block.attentions[0], "processor", AttnProcessor2_0()),
        lambda vae: setattr(vae.decoder, "conv_in", copy.deepcopy(vae.decoder.conv_out)),
    ]
    for change in changes:
        vae = case.build()
        with parallelize_vae(vae, EXACT, group=group):
            change(vae)
            found.append(text_of(lambda vae=vae: vae.decode(z)))
    vae = SmallVae(nn.BatchNorm2d(8))
    with parallelize_vae(vae, EXACT, group=group):
        vae.train()
        found.append(text_of(lambda: vae.decode(Z)))
    return found


def test_what_is_changed_while_applied_is_an_error(ranks):
    for *replaced, training in ranks.run(changed_while_applied):
        for text in replaced:
            assert "was replaced or added after parallelize_vae" in text
        assert "takes statistics of its batch" in training


class Wrapper:
    def __init__(self, decode: Callable[..., Tensor]) -> None:
        self.decode = decode

    def __call__(self, z: Tensor) -> Tensor:
        return self.decode(z)


@torch.no_grad()
def kept_and_copied() -> None:
    group, vae = everyone(), SmallVae()
    alone = vae.decode(Z)
    own = vae.decoder[0].forward = lambda x: nn.Conv2d.forward(vae.decoder[0], x)
    handle = parallelize_vae(vae, EXACT, group=group)
    kept = vae.decode
    wrapper = vae.decode = Wrapper(vae.decode)
    twin = copy.deepcopy(vae.decoder)
    assert torch.equal(twin(Z), alone)
    handle.remove()
    assert vae.decode is wrapper
    assert vae.decoder[0].forward is own
    for decode in (kept, wrapper, vae.decode):
        assert torch.equal(decode(Z), alone)
    del vae.decode
    with parallelize_vae(vae, EXACT, group=group):
        twin = copy.deepcopy(vae)
        twin.decoder[5].weight.zero_()
        assert not torch.allclose(twin.decode(Z), alone)
        assert error(vae.decode(Z), alone) <= 1e-5


def test_what_was_kept_wrapped_or_copied_is_whole_after_removal(ranks):
    ranks.run(kept_and_copied)


class Mean(nn.Module):
    """Mixes space a little, which rounding to bfloat16 could hide."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * x.mean((-2, -1), keepdim=True)


def hidden_by_rounding() -> str:
    vae = SmallVae(Mean()).to(torch.bfloat16)
    return text_of(lambda: parallelize_vae(vae, VaeParallelConfig("exact"), group=everyone()))


def test_the_check_of_an_autoencoder_in_half_precision_is_made_in_float32(ranks):
    for text in ranks.run(hidden_by_rounding):
        assert "module 'decoder.3', a Mean, is the first that differs" in text


@torch.no_grad()
def odd_samples() -> tuple[Any, Any]:
    vae, x = SmallVae(), random(1, 3, 9, 7)
    alone = vae.encode(x)
    with parallelize_vae(vae, VaeParallelConfig("exact", result="first"), group=everyone()):
        return vae.encode(x), alone


def test_a_sample_that_is_encoded_whole_goes_to_those_who_get_results(ranks):
    (first, alone), (second, _) = ranks.run(odd_samples)
    assert torch.equal(first, alone)
    assert second is None
