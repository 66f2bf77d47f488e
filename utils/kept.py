"""What a method has kept of a layer: what reports show and checkpoints hold."""

from dataclasses import asdict, dataclass, field


@dataclass
class Kept:
    """One layer after pruning. What does not apply is left unset.

    Attributes:
        pattern: what lived and died together, in words.
        rate: the share that was asked to go.
        sparsity: the share of the weights that went.
        N: block length; 1 where there are no blocks of several rows.
        width: output channels, dense and left.
        filters: of the dense layer, where `positions` are counted.
        positions: (kh, kw): how many filters keep each position of the kernel.
        error: what a repair has left of the variance of its outputs, as a share.
        kept_l1: order of filters -> the share of the L1 norm that its blocks keep.
        note: what a reader should know about the layer.
    """

    pattern: str
    rate: float | None = None
    sparsity: float | None = None
    N: int = 1
    width: list[int] | None = None
    filters: int | None = None
    positions: list[list[int]] | None = None
    error: float | None = None
    kept_l1: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> dict:
        """What is set, as plain values."""
        unset = {"N": 1}
        return {name: value for name, value in asdict(self).items() if value not in (None, "", {}, unset.get(name))}

    @property
    def in_blocks(self) -> bool:
        """Are there blocks of several rows, some of them gone?"""
        return self.N > 1 and bool(self.rate)
