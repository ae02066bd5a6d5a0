"""Small models whose forwards hold more than a chain of blocks, so that they cannot be cut."""

from __future__ import annotations

from partition_toys import OddName, Toy, ToyBlock, TwoLists
from torch import Tensor, nn


class SkippingBlock(ToyBlock):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return super().forward(x if skip is None else x + skip)


class Position(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = block(x * i)
        return self.head(x)


class Attribute(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
            x = x * block.scale
        return self.head(x)


class Counter(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        at = 0
        for block in self.blocks:
            x = block(x + at)
            at = at + 1
        return self.head(x)


class CounterBefore(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        at = 0
        for block in self.blocks:
            at += 1  # noqa: SIM113
            x = block(x * at)
        return self.head(x)


class Residual(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            before = x
            x = block(x)
            x = x + before
        return self.head(x)


class Collected(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return self.head(sum(found))


class Kept(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            scaled = x * 2
            x = block(scaled)
        return self.head(x + scaled)


class Zipped(TwoLists):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block, other in zip(self.blocks, self.single_blocks, strict=False):
            x = other(block(x))
        return self.head(x)


class Twice(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class CalledTwice(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
            x = block(x)
        return self.head(x)


class Repeated(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(2):
            for block in self.blocks:
                x = block(x)
        return self.head(x)


class Measured(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x / len(self.blocks))
        return self.head(x)


class Indexed(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.blocks[0].shift)


class Stale(TwoLists):
    """The head wants what the first list gave, which a chunk of the second never saw."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        z = x * 2
        for block in self.single_blocks:
            z = block(z)
        return self.head(z + x)


class StaleBySteps(TwoLists):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        half = x / 2
        quarter = half / 2
        for block in self.single_blocks:
            x = block(x)
            x = x + quarter
        return self.head(x)


class Helper(Toy):
    """Loops where nobody looks."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.through(self.embed(x)))

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class TwoOddNames(OddName):
    def __init__(self) -> None:
        super().__init__()
        self.layers_of_text = nn.ModuleList(ToyBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for one in self.layers_of_text:
            x = one(x)
        for one in self.strata:
            x = one(x)
        return self.head(x)


class HalfSeen(TwoLists):
    """The second list is the trunk too, but is not looped over plainly."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        for block in self.single_blocks[1:]:
            x = block(x)
        return self.head(x)


class UShaped(Toy):
    block = SkippingBlock

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, None)
        return self.head(x)


class UNet(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks, self.up_blocks = self.blocks, nn.ModuleList()
