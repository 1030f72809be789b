"""What a stage of training gave."""

from dataclasses import dataclass
from pathlib import Path

from auxin.accounting.ledger import Ledger


@dataclass(frozen=True)
class TrainingResult:
    """What a stage of training gave."""

    checkpoint: Path
    """Folder of the last checkpoint."""
    value: float | None
    """What the first measure gives on the whole held-out split, the loss where none was named; None when `stop_after`
    ended the call before the stage."""
    measures: dict[str, float]
    """All measures at the end, by name; empty where `value` is None."""
    units: int
    """Units of data (tokens, examples, ...) of the stage, those of skipped and rewound steps included: they cost as
    much. Of text they are tokens of the text, whatever the objective makes of them."""
    flops: float
    """Training FLOPs of the stage, forward and backward."""
    seconds: float
    """Wall time of the stage, evaluations included, summed over its pieces."""
    steps: int
    """Optimizer steps done."""
    data_position: int
    """Batch of the data order that a next stage with the same batch size would start at to see new data."""
    ledger: Ledger
    """The parent's books with this stage at their end."""
