"""Tokenizers and text encoders: the two kinds that Flux has, each a few hundred kilobytes."""

import json
from typing import Final

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from demo_model.grammar import vocabulary

LENGTH: Final = 24
"""Tokens of a caption: 17 words at most and the end token, rounded up to a multiple of 8 so that
the text too divides over 2, 4 or 8 ranks."""
WIDTH: Final = 96
_PUNCTUATION: Final = ".,!"


def clip_tokenizer() -> CLIPTokenizer:
    """Return a byte-pair tokenizer that knows each word of the grammar as one token.

    Other words come apart into letters; a character that occurs in no word of the grammar is the
    unknown token.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=0, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator([*vocabulary()], trainer)
    merges = [tuple(pair) for pair in _merges(learner)]
    pieces = {piece for pair in merges for piece in pair} | {"".join(pair) for pair in merges}
    pieces |= {f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")}
    special = ["<|startoftext|>", "<|endoftext|>", "<pad>", "<unk>"]
    # The end token must not have id 2: that value selects a legacy way of pooling in CLIP.
    names = [*special, *sorted(pieces | {f"{mark}</w>" for mark in _PUNCTUATION})]
    return CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=merges,
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=LENGTH,
    )


def _merges(learner: Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(learner.to_str())["model"]["merges"]
    return merges


def t5_tokenizer() -> T5Tokenizer:
    """Return a tokenizer that knows the words of the grammar; all others are the unknown token."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # A normaliser to lower case would be lost on loading; a capital at the start is provided for.
    pieces += [(f"▁{word}", -1.0) for word in [*vocabulary(), "A", "An"]]
    pieces += [(mark, -1.0) for mark in _PUNCTUATION]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text encoder; Flux uses its pooled output."""
    torch.manual_seed(1)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Return an untrained T5 encoder; Flux uses its output token by token."""
    torch.manual_seed(2)
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=24,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
