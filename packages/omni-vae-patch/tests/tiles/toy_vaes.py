"""Small autoencoders of the tests' own, which tile as those of diffusers do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """Pointwise, so that without overlap its tiles differ from the whole by the norm alone."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(4, 8, 1), nn.SiLU(), nn.Conv2d(8, 3, 1)]
        if norm:
            layers.insert(1, nn.GroupNorm(2, 8))
            nn.init.normal_(layers[1].weight)
        self.decoder = nn.Sequential(*layers)
        self.use_tiling = True
        self.tile_latent_min_size = 4

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        picture = self.joined(z) if self.use_tiling else self.decoder(z)
        return SimpleNamespace(sample=picture) if return_dict else (picture,)

    def joined(self, z: Tensor) -> Tensor:
        rows = [
            torch.cat([self.decoder(tile) for tile in row.split(self.tile_latent_min_size, -1)], -1)
            for row in z.split(self.tile_latent_min_size, -2)
        ]
        return torch.cat(rows, -2)


class Remembering(Toy):
    """Its network adds what it was last called with, until that is cleared for the next row."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.decoder = Memory()

    def joined(self, z: Tensor) -> Tensor:
        rows = []
        for row in z.split(self.tile_latent_min_size, -2):
            tiles = [self.decoder(tile) for tile in row.split(self.tile_latent_min_size, -1)]
            self.decoder.layer.last = None
            rows.append(torch.cat(tiles, -1))
        return torch.cat(rows, -2)


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Module()
        self.layer.last = None

    def forward(self, x: Tensor) -> Tensor:
        last, self.layer.last = self.layer.last, x
        return x if last is None else x + 2 * last.mean()


class Counting(Toy):
    """Its network counts its calls, and nobody sets the count back."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.decoder = Counter()


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return 2 * x


class Passing(Toy):
    """Gives its network what it returned last, for each row anew."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.decoder = Continuing()

    def joined(self, z: Tensor) -> Tensor:
        rows = []
        for row in z.split(self.tile_latent_min_size, -2):
            tiles: list[Tensor] = []
            for part in row.split(self.tile_latent_min_size, -1):
                tiles.append(self.decoder(part, before=tiles[-1] if tiles else None))
            rows.append(torch.cat(tiles, -1))
        return torch.cat(rows, -2)


class Continuing(nn.Module):
    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        return x if before is None else x + 2 * before.mean()


class Feeding(Toy):
    """Makes each tile from the result of the one before."""

    def joined(self, z: Tensor) -> Tensor:
        tile, tiles = z[..., :4], []
        for part in z.split(4, -1):
            tile = self.decoder(part + tile.mean())
            tiles.append(tile)
        return torch.cat(tiles, -1)


class Looking(Toy):
    """Decodes bright tiles twice."""

    def joined(self, z: Tensor) -> Tensor:
        tiles = []
        for part in z.split(4, -1):
            tile = self.decoder(part)
            tiles.append(self.decoder(part) if tile.mean() > 0 else tile)
        return torch.cat(tiles, -1)


class Bypassing(Toy):
    """Never calls the network itself."""

    def joined(self, z: Tensor) -> Tensor:
        return self.decoder[0](z)


class Skipping(Toy):
    """Calls its network twice, unless a tile has three channels, as real ones have."""

    def joined(self, z: Tensor) -> Tensor:
        tile = self.decoder(z)
        return tile if tile.shape[1] == 3 else self.decoder(z) + tile


class Depending(Toy):
    """Calls its network once more where a tile has three channels, as real ones have."""

    def joined(self, z: Tensor) -> Tensor:
        tile = self.decoder(z)
        return self.decoder(z) + tile if tile.shape[1] == 3 else tile
