import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni_group_coordinator import (
    ParallelConfigError,
    backend_for_device,
    get_local_device,
    split_sizes,
)
from omni_group_coordinator.utils import build_local_sp_padding_mask


@given(total=st.integers(0, 10**9), parts=st.integers(1, 300))
def test_a_split_is_complete_balanced_and_largest_first(total: int, parts: int):
    sizes = split_sizes(total, parts)
    assert len(sizes) == parts
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(total=st.integers(0, 500), parts=st.integers(1, 40))
def test_a_split_is_that_of_tensor_split(total: int, parts: int):
    assert split_sizes(total, parts) == [
        piece.numel() for piece in torch.arange(total).tensor_split(parts)
    ]


@pytest.mark.parametrize(("total", "parts"), [(-1, 2), (3, 0), (3, -1)])
def test_a_split_that_cannot_be_is_refused_with_the_numbers(total: int, parts: int):
    with pytest.raises(ParallelConfigError, match=f"length of {total} into {parts} parts"):
        split_sizes(total, parts)


def test_each_known_device_type_has_a_backend():
    pairs = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl", "npu": "hccl", "hpu": "hccl"}
    assert {device: backend_for_device(device) for device in pairs} == pairs


def test_an_unknown_device_type_is_refused_with_the_known_ones():
    with pytest.raises(ParallelConfigError, match=r"'tpu' \(known: cpu, cuda, hpu, npu, xpu\)"):
        backend_for_device("tpu")


def test_without_an_accelerator_the_local_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert get_local_device(3) == torch.device("cpu")


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 5)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return monkeypatch


def test_the_local_device_is_that_of_the_local_rank(accelerator: pytest.MonkeyPatch):
    assert get_local_device(2) == torch.device("cuda", 2)
    assert get_local_device(0) == torch.device("cuda", 0)
    accelerator.setenv("LOCAL_RANK", "3")
    assert get_local_device() == torch.device("cuda", 3)
    assert get_local_device(1) == torch.device("cuda", 1)


def test_a_process_that_sees_one_device_uses_it_whatever_its_local_rank(
    accelerator: pytest.MonkeyPatch,
):
    accelerator.setattr(torch.accelerator, "device_count", lambda: 1)
    assert get_local_device(3) == torch.device("cuda", 0)


def test_a_local_rank_beyond_the_devices_is_refused_with_their_count(
    accelerator: pytest.MonkeyPatch,
):
    accelerator.setattr(torch.accelerator, "device_count", lambda: 2)
    assert get_local_device(1) == torch.device("cuda", 1)
    with pytest.raises(
        ParallelConfigError, match=r"local rank 2 .* this process sees 2; .*device="
    ):
        get_local_device(2)


@pytest.mark.usefixtures("accelerator")
def test_without_a_local_rank_the_local_device_is_the_current_one():
    assert get_local_device() == torch.device("cuda", 5)


def test_a_build_whose_accelerator_is_absent_falls_back_to_the_cpu(
    accelerator: pytest.MonkeyPatch,
):
    accelerator.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert get_local_device(1) == torch.device("cpu")


def test_without_padding_there_is_no_mask_on_any_rank():
    assert [build_local_sp_padding_mask(2, 4, 8, 0, rank) for rank in range(2)] == [None, None]


@pytest.mark.parametrize(("length", "ranks"), [(9, 8), (10, 4), (7, 2), (1, 3)])
def test_the_masks_of_all_ranks_are_that_of_the_whole_sequence(length: int, ranks: int):
    local = -(-length // ranks)
    padding = local * ranks - length
    masks = [build_local_sp_padding_mask(3, local, length, padding, r) for r in range(ranks)]
    assert all(mask is not None and mask.dtype is torch.bool for mask in masks)
    whole = torch.cat([mask for mask in masks if mask is not None], dim=1)
    expected = torch.tensor([[True] * length + [False] * padding] * 3)
    assert torch.equal(whole, expected)
