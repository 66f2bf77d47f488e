"""Tensors whose channels share one order, and the reasons why an order or a number of channels must stay."""

from dataclasses import dataclass, field

# This reason forbids another order for one layer alone. It does not forbid one for all layers of the space together.
SUM = "a residual sum"
LOGITS = "the logits"
GROUPS = "a grouped convolution"


@dataclass(eq=False)
class Space:
    """Tensors whose channels share one order."""

    channels: int | None = None  # how many; None if nobody knows
    producers: list[str] = field(default_factory=list)  # convolutions and linear layers that write the channels
    carriers: list[str] = field(default_factory=list)  # batch norms and depthwise layers, which treat each by itself
    consumers: list[str] = field(default_factory=list)  # layers that read the channels, as often as they do
    fixed: set[str] = field(default_factory=set)  # reasons why their order must stay; empty if any order will do
    sized: set[str] = field(default_factory=set)  # reasons why their number must stay, although any order will do
    scaled: bool = False  # two tensors of this space are multiplied with each other (squeeze-excite)

    @property
    def whole(self) -> set[str]:
        """Reasons why none of the channels may be removed."""
        return (self.fixed - {SUM}) | self.sized

    def absorb(self, other: "Space") -> None:
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            if isinstance(mine, list):
                mine.extend(theirs)
        self.fixed |= other.fixed
        self.sized |= other.sized
        self.scaled |= other.scaled
        self.channels = self.channels or other.channels


Spaces = tuple[Space, ...]  # of a tensor's channels, one after another
