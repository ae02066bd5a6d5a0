"""Trains the transformer by flow matching.

The transformer learns noise minus latents at ``x = (1 - sigma) * latents + sigma * noise``, which
is what `FlowMatchEulerDiscreteScheduler` integrates.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from demo_model import text
from demo_model.autoencoder import CHANNELS
from demo_model.loop import Average, Stateful, learning_rate, optimiser_step, run_phase, seed_step
from demo_model.pool import Pool, Tokenizers, tokenize

HEADS: Final = 4
HEAD_DIM: Final = 40
BATCH: Final = 64
PEAK_RATE: Final = 2e-3
WARM_UP: Final = 50
"""Steps in which the learning rate rises to its peak."""
AVERAGE_DECAY: Final = 0.996
CAPTION_DROPOUT: Final = 0.1
"""Share of pictures shown with the empty caption, which guidance needs."""
MATRIX: Final = 2
SIGMA_SHIFT: Final = 1.5
"""Over 1 spends more samples on noisy latents, where it is decided what goes where."""


class Conditioned(nn.Module):
    """The transformer and the two text encoders that it is conditioned on."""

    def __init__(self, tokenizers: Tokenizers) -> None:
        """Build all three untrained."""
        super().__init__()
        self.clip: CLIPTextModel = text.clip_encoder(tokenizers[0])
        self.t5: T5EncoderModel = text.t5_encoder(tokenizers[1])
        self.transformer: FluxTransformer2DModel = build_transformer()

    def conditions(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled and the per-token embedding as `FluxPipeline` computes them."""
        pooled: Tensor = self.clip(clip_ids).pooler_output
        tokens: Tensor = self.t5(t5_ids).last_hidden_state
        return pooled, tokens


def build_transformer() -> FluxTransformer2DModel:
    """Return an untrained transformer whose blocks start as the identity."""
    torch.manual_seed(3)
    model = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 16, 16),
    )
    for name, module in model.named_modules():
        modulation = name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear"))
        if modulation or name in ("norm_out.linear", "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def position_ids(size: tuple[int, int]) -> Tensor:
    """Return the row and column of each packed latent token, T 3."""
    rows, columns = size[0] // 16, size[1] // 16
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros(rows, columns), *grid], dim=-1).view(-1, 3)


def _sigmas(count: int) -> Tensor:
    even = (torch.arange(count) + torch.rand(count)) / count  # one in each stratum: less noise
    return SIGMA_SHIFT * even / (1 + (SIGMA_SHIFT - 1) * even)


class _Optimisers:
    """Muon for the matrices inside the blocks, AdamW for everything else, as one optimiser."""

    def __init__(self, model: Conditioned) -> None:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            inside = name.startswith("transformer.") and "transformer_blocks." in name
            (matrices if inside and parameter.ndim == MATRIX else rest).append(parameter)
        self.parts = (
            torch.optim.Muon(
                matrices, lr=PEAK_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01),
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()  # type: ignore[no-untyped-call]

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state_dict: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, state_dict, strict=True):
            part.load_state_dict(state)


def _compiled(model: Conditioned) -> Callable[..., tuple[Tensor]]:
    forward: Callable[..., tuple[Tensor]] = torch.compile(model.transformer, dynamic=False)
    return forward


def train(
    work: Path,
    steps: int,
    model: Conditioned,
    pool: Pool,
    tokenizers: Tokenizers,
    normal: tuple[float, float],
) -> Average:
    """Train the transformer, or finish training it, and return the moving average of the weights.

    The text encoders are taken as they are: they have learned to read by now, and noisy gradients
    of pictures would make them forget it. `normal` is the mean and the deviation of the latents.
    """
    model.clip.requires_grad_(False)
    model.t5.requires_grad_(False)
    optimisers = _Optimisers(model)
    average = Average(model, AVERAGE_DECAY)
    compiled = _compiled(model)
    empty_clip, empty_t5 = (tokenize(tokenizer, [""]) for tokenizer in tokenizers)
    text_positions = torch.zeros(text.LENGTH, 3)

    def step(index: int) -> dict[str, float]:
        seed_step(index)
        chosen = torch.randint(len(pool.latents), (BATCH,))
        wording = torch.randint(pool.clip_ids.shape[1], (BATCH,))
        dropped = (torch.rand(BATCH) < CAPTION_DROPOUT)[:, None]
        pooled, tokens = model.conditions(
            torch.where(dropped, empty_clip, pool.clip_ids[chosen, wording]),
            torch.where(dropped, empty_t5, pool.t5_ids[chosen, wording]),
        )
        latents = (pool.latents[chosen].float() - normal[0]) / normal[1]
        noise, sigmas = torch.randn_like(latents), _sigmas(BATCH)
        noisy = torch.lerp(latents, noise, sigmas[:, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            velocity = compiled(
                hidden_states=noisy,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                timestep=sigmas,
                img_ids=position_ids(pool.size),
                txt_ids=text_positions,
                return_dict=False,
            )[0]
        loss = nn.functional.mse_loss(velocity.float(), noise - latents)
        rate = learning_rate(index, steps, peak=PEAK_RATE, warm_up=WARM_UP)
        optimiser_step(loss, model, optimisers, rate)
        average.update(index)
        return {"loss": loss.item()}

    keep: dict[str, Stateful] = {"model": model, "optimisers": optimisers, "average": average}
    run_phase("drawing", work, steps, keep, step)
    return average
