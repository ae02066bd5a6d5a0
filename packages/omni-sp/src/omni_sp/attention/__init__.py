"""Attention over a sequence that is split over ranks: Ulysses, Ring, AllGather-KV, and hybrids."""

from omni_sp.attention.parallel import ParallelAttention, sequence_parallel_attention
from omni_sp.attention.volume import Degrees, attention_volume

__all__ = ["Degrees", "ParallelAttention", "attention_volume", "sequence_parallel_attention"]
