"""What happens when a pipeline in stages is defined and made: order of bases, wrapped methods."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_staged_pipelines import Loop, Staged, in_stages, seeded

from omni_cfgp import CFGParallelMixin
from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelLayout, ParallelState, get_parallel_state
from omni_pp.mixin.wrapping import wrap_method
from omni_pp.pipeline_parallel import AsyncLatents, PipelineParallelMixin


class OwnGuidance:
    """Offers what the guidance mixin does, by another name."""

    def predict_noise_maybe_with_cfg(self) -> None: ...
    def combine_cfg_noise(self) -> None: ...
    def scheduler_step_maybe_with_cfg(self) -> None: ...


class More(CFGParallelMixin):
    pass


@pytest.mark.parametrize(
    ("bases", "text"),
    [
        ((PipelineParallelMixin,), "Mine has no CFGParallelMixin among its bases"),
        ((Loop, PipelineParallelMixin), "Mine has no CFGParallelMixin among its bases"),
        ((CFGParallelMixin, PipelineParallelMixin), "CFGParallelMixin comes before Pipe"),
        ((More, PipelineParallelMixin), "CFGParallelMixin comes before Pipe"),
        ((OwnGuidance, PipelineParallelMixin), "OwnGuidance comes before Pipe"),
    ],
)
def test_guidance_must_come_behind(bases: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text) as caught:
        type("Mine", bases, {})
    assert "class Mine(PipelineParallelMixin, " in str(caught.value)


def test_guidance_behind_is_right_also_further_on() -> None:
    base = type("Base", (PipelineParallelMixin, More), {})
    type("Child", (Loop, base), {})
    type("Other", (PipelineParallelMixin, OwnGuidance), {})


def test_who_gets_the_latents_must_be_known() -> None:
    with pytest.raises(ParallelConfigError, match=r"pp_latents_on='last' is unknown; legal: 'all'"):
        type("Mine", (Staged,), {"pp_latents_on": "last"})


# -- wrapped methods ---------------------------------------------------------------------------


class Vae:
    """An autoencoder that notes who calls it."""

    def __init__(self) -> None:
        self.calls = 0

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Twice the latents."""
        self.calls += 1
        return (z * 2,)


class WithVae:
    def __init__(self, vae: Any) -> None:
        """Makes it of a VAE."""
        self.vae = vae

    def diffuse(self, steps: int = 2) -> Any:
        """What is shown."""
        return AsyncLatents({"latents": torch.ones(steps)}, [], [])


class Inherited(PipelineParallelMixin, WithVae, CFGParallelMixin):
    """Defines neither method."""


class Before(WithVae, PipelineParallelMixin, CFGParallelMixin):
    """Inherits them from a base that comes first."""


class Child(Inherited):
    def __init__(self, vae: Any) -> None:
        super().__init__(vae)

    def diffuse(self, steps: int = 2) -> Any:
        return super().diffuse(steps)


class Later(WithVae):
    def diffuse(self, steps: int = 2) -> Any:
        return super().diffuse(steps + 1)


class Together(Inherited, Later):
    """Put together of classes, one of which overrides what the other has wrapped."""


def test_metadata_is_that_of_the_methods() -> None:
    for cls in (Inherited, Before):
        assert "wrapped" not in str(inspect.signature(cls))
        assert inspect.signature(cls.__init__) == inspect.signature(WithVae.__init__)
        assert inspect.signature(cls.diffuse) == inspect.signature(WithVae.diffuse)
        assert cls.diffuse.__name__ == "diffuse"
        assert cls.diffuse.__doc__ == "What is shown."


def test_no_method_is_wrapped_twice() -> None:
    class Grandchild(Child):
        pass

    assert "diffuse" not in vars(Grandchild)
    assert "__init__" not in vars(Grandchild)
    before = Inherited.diffuse
    wrap_method(Inherited, "diffuse", lambda pipeline, call: call())
    assert Inherited.diffuse is before
    vae = Vae()
    Child(vae)
    assert not hasattr(vae.decode.__wrapped__, "__wrapped__")
    Child(vae)
    assert not hasattr(vae.decode.__wrapped__, "__wrapped__")


def test_pipelines_without_these_methods_are_left_alone() -> None:
    class Nothing(PipelineParallelMixin, CFGParallelMixin):
        pass

    assert Nothing.__init__ is object.__init__
    Inherited(None)
    Inherited(object())


def diffused(cls: Any) -> Any:
    pipeline = cls(Vae())
    found = pipeline.diffuse(3)
    assert type(found) is Tensor
    return found


@pytest.mark.parametrize("cls", [Inherited, Before, Child, Together])
def test_inherited_loops_give_real_latents(ranks: Any, cls: type) -> None:
    for found in ranks.run(in_stages, 2, 1, diffused, cls):
        assert torch.equal(found, torch.ones(4 if cls is Together else 3))


# -- the autoencoder ---------------------------------------------------------------------------


class Distributed(Vae):
    """Decodes on all ranks together."""

    enabled = True

    def is_distributed_enabled(self) -> bool:
        return self.enabled

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        return (get_parallel_state().pp.all_reduce(z.clone()),)


class Off(Distributed):
    enabled = False
    decode = Vae.decode


class ModuleVae(nn.Module):
    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        return (z * 2,)


def decoded(kind: str) -> Any:
    vae: Any = {"distributed": Distributed, "off": Off, "module": ModuleVae}.get(kind, Vae)()
    if kind == "replaced before":
        vae.decode = Distributed.decode.__get__(vae)
    cls = Inherited if kind != "latents under way" else Before
    pipeline = cls(vae)
    if kind == "replaced later":
        inner = vae.decode
        vae.decode = lambda z, return_dict=True: inner(z + 1)
    z = seeded(2, 3, seed=get_parallel_state().pp.rank_in_group)
    if kind == "latents under way":
        z = AsyncLatents({"latents": z}, [], [])
    one = pipeline.vae.decode(z, return_dict=False)
    other = pipeline.vae.decode(z=z)
    assert (one[0] is None) == (other[0] is None)
    assert one[0] is None or torch.equal(one[0], other[0])
    return (one == (None,), one.sample) if one[0] is None else one[0]


@pytest.mark.parametrize("kind", ["plain", "off", "module", "latents under way"])
def test_the_first_stage_alone_decodes(ranks: Any, kind: str) -> None:
    first, *others = ranks.run(in_stages, 3, 1, decoded, kind, world_size=3)
    assert torch.equal(first, seeded(2, 3, seed=0) * 2)
    assert others == [(True, None)] * 2


@pytest.mark.parametrize("kind", ["distributed", "replaced before"])
def test_a_distributed_one_decodes_the_latents_of_the_first_on_all(ranks: Any, kind: str) -> None:
    for found in ranks.run(in_stages, 3, 1, decoded, kind, world_size=3):
        assert torch.allclose(found, seeded(2, 3, seed=0) * 3)


def test_one_that_is_made_distributed_later_decodes_on_all(ranks: Any) -> None:
    for rank, found in enumerate(
        ranks.run(in_stages, 3, 1, decoded, "replaced later", world_size=3)
    ):
        assert torch.equal(found, (seeded(2, 3, seed=rank) + 1) * 2)


def test_without_stages_it_decodes() -> None:
    pipeline = Inherited(Vae())
    expected = torch.ones(2) * 2
    assert torch.equal(pipeline.vae.decode(torch.ones(2))[0], expected)
    with ParallelState(ParallelLayout()).use():
        assert torch.equal(pipeline.vae.decode(torch.ones(2))[0], expected)
    assert pipeline.vae.decode.__doc__ == "Twice the latents."
