"""The arguments of the study."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from study import Ascending, Count, Distinct, Settings, Some, Whole

Subject = Literal["depths", "two_gradients", "stacked", "mesh", "leaves"]
NetworkName = Literal["cnn", "mlp", "transformer", "gpt"]
Policy = Literal["inputs", "everything"]
Arrangement = Literal["fsdp", "fsdp_tensor", "stacked", "stack_axis"]
Width = Annotated[int, Field(ge=4, multiple_of=4)]
Blocks = Annotated[int, Field(ge=2)]
Shape = Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*$")]
DEVICES = 8


class Counts(Settings):
    """Count what programs do, and time them against others that do the same."""

    subjects: Distinct[Subject] = get_args(Subject)
    """Training steps at each depth; two gradients of a batch at each depth; a GPT with stacked
    blocks, at every depth; updates on a mesh; and orthogonalizations of many leaves."""
    repetitions: Whole = 0
    """Timed rounds of depths, two_gradients and stacked, in which programs take turns."""

    networks: Distinct[NetworkName] = get_args(NetworkName)
    """In depths, and all but the gpt, whose blocks are stacked, in two_gradients."""
    batch_size: Count = 32
    """Images, or sequences of 64 tokens, in a batch of these."""
    channels: Some[Count] = (16, 32, 64)
    """Output channels of each convolution of the CNN."""
    widths: Some[Count] = (256, 256, 256)
    """Of each hidden layer of the MLP."""
    width: Width = 64
    """Of the residual streams of transformer and gpt, which have 4 heads."""
    blocks: Blocks = 3
    """Of the gpt."""

    stacked_width: Width = 384
    """In stacked: of the residual stream, with 4 heads."""
    stacked_blocks: Blocks = 12
    """In stacked: how many there are."""
    context: Count = 128
    """In stacked: tokens that a sequence predicts."""
    stacked_batch_size: Count = 8
    """In stacked: sequences in a batch."""
    policies: Distinct[Policy] = ("inputs",)
    """In stacked: what a block saves for its backward pass."""
    narrow_blocks: Ascending[Blocks] = (4, 12)
    """In stacked: blocks of the gpts, of --width, whose programs for all depths are counted."""

    arrangements: Distinct[Arrangement] = get_args(Arrangement)
    """In mesh: how matrices are sharded over 8 devices. Each is a leaf of its own, over one axis
    (fsdp) or two (fsdp_tensor, a mesh of 4 x 2, every other matrix transposed), or they are rows of
    a stack, which is sharded inside each row (stacked) or by rows (stack_axis)."""
    matrices: Ascending[Count] = (1, 2, 4, 8, 12, 24, 48)
    """In mesh: numbers of matrices; stack_axis has those that the devices divide."""
    shapes: Ascending[Count] = (1, 2, 3, 4)
    """In mesh: numbers of shapes, of 8 matrices each."""
    num_steps: Ascending[Count] = (5, 8, 12)
    """In mesh: steps of the Newton-Schulz iteration, the first those of everything else."""
    layers: Annotated[int, Field(ge=8, multiple_of=8)] = 16
    """In mesh: matrices, one a layer, where steps and depths are compared."""

    leaf_shapes: Distinct[Shape] = ("512x2048", "64x64")
    """In leaves: ROWSxCOLS of equal leaves."""
    leaf_counts: Ascending[Count] = (1, 8, 48)
    """In leaves: how many of them."""
