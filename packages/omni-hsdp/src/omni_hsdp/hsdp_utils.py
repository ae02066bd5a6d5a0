"""What a repeated block looks like by its name."""

from __future__ import annotations

from typing import Any


def is_transformer_block_module(name: str, module: Any) -> bool:
    """Whether a name is that of one transformer block in a list of them.

    A shard condition for the models that call their lists ``transformer_blocks`` or
    ``single_transformer_blocks``.

    Args:
        name: Dotted name of a module in its model.
        module: The module; not looked at.

    Returns:
        True for ``"transformer_blocks.3"``, False for ``"transformer_blocks.3.attn"``.
    """
    return "transformer_blocks" in name and name.rpartition(".")[2].isdigit()
