"""The arguments of the study, and the sentences that refuse bad ones."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from arguments import require, require_folder

Policy = Literal["inputs", "everything"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measure a GPT with stacked blocks at every depth, which one program takes as an argument."""

    output_dir: Path
    """Folder for stacked_cost.json and stacked_cost.png."""
    policies: tuple[Policy, ...] = POLICIES
    """What a block saves for its backward pass: its inputs, or everything."""
    num_blocks: int = 12
    """Blocks of the network that is timed."""
    width: int = 384
    """Of the residual stream."""
    num_heads: int = 6
    """Of each attention."""
    vocabulary: int = 256
    """Tokens that are told apart."""
    context: int = 128
    """Tokens that a sequence predicts."""
    batch_size: int = 8
    """Sequences in a batch."""
    tied: bool = False
    """Whether the token table is the head too."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters and the optimizer's state are float32."""
    gradient_only: bool = False
    """Leave out whole steps and updates."""
    repetitions: int = 7
    """Rounds in which every program runs once; 0 leaves counts only."""
    compile_blocks: tuple[int, ...] = (4, 12, 24, 48)
    """Blocks of the narrow networks whose programs are compiled and counted."""
    compile_width: int = 64
    """Of their residual stream, with 2 heads and 16 sequences of 16 tokens."""


def check_settings(settings: Settings) -> None:
    """Ends the program with a sentence for arguments that make no study."""
    for name in ("policies", "compile_blocks"):
        values = getattr(settings, name)
        require(len(values) > 0, name, "needs at least one value")
        require(len(set(values)) == len(values), name, f"names a value twice: {values}")
    for name in ("width", "num_heads", "vocabulary", "context", "batch_size"):
        value = getattr(settings, name)
        require(value >= 1, name, f"must be at least 1, got {value}")
    for name in ("num_blocks", "compile_blocks"):
        values = getattr(settings, name)
        smallest = values if isinstance(values, int) else min(values)
        require(smallest >= 2, name, f"must be at least 2, got {values}")
    require(
        settings.width % settings.num_heads == 0,
        "num_heads",
        f"must divide the width {settings.width}, got {settings.num_heads}",
    )
    width = settings.compile_width
    require(width >= 2 and width % 2 == 0, "compile_width", f"must be even, got {width}")
    repetitions = settings.repetitions
    require(repetitions >= 0, "repetitions", f"must not be negative, got {repetitions}")
    require_folder("output_dir", settings.output_dir)


def narrow(settings: Settings, num_blocks: int) -> Settings:
    """The network of so many blocks whose programs are counted."""
    return dataclasses.replace(
        settings,
        num_blocks=num_blocks,
        width=settings.compile_width,
        num_heads=2,
        context=16,
        batch_size=16,
    )
