"""What a leaf is: the one rule behind labels, roles and the axes of LMOs.

It reads the words of a leaf's path, its shape, the leaves beside it, and what a module says of it.
Where these allow of two readings it is an error that asks, whatever the leaf is called.
"""

import functools
import itertools
import math
import re
from collections.abc import Sequence

from dropmuon_jax.layers.dimension_numbers import Grouped
from dropmuon_jax.layers.sites import KERNELS, NAMES_IN_DOUBT, Site, cut_of

# A component is called after its last word: `tok_embeddings` is a table, `emb_proj` is none.
_TABLES = {*"embed embeds embedding embeddings embedder emb embs wte wpe cls table".split()}
_AFTER_TABLES = {*"token tokens layer lookup in".split()}  # `embed_tokens` is a table
_INDICES = {*"tok token tokens word words vocab".split()}
_POSITIONS = {"pos", "position", "positions"}
_HEADS = {"head", "classifier", "logits", "unembed", "unembedding"}
_ATTENTION = {"attention", "attn"}
_NORMS = {*"norm ln bn gn layernorm rmsnorm batchnorm groupnorm instancenorm".split()}
# What ends so is a vector, which some layers keep with more than one axis.
_VECTORS = {*"bias biases scale scales offset beta gamma alpha slope".split()}
# timm's eligibility rule for Muon (timm/optim/muon.py); beyond it a matrix looks like a table.
_MAX_ASPECT_RATIO = 128
_CONVOLUTIONS = {
    *"conv convs convolution convolutions cnn patch patches patchify stem downsample".split(),
    *"upsample shortcut embed embedding depthwise separable pointwise deconv".split(),
}
# Of the square window of a convolution; patch embeddings have 14 and 16.
_MAX_WINDOW = 16
HEADS = f"{', '.join(sorted(_HEADS))}, or a name that ends so, such as lm_head"


@functools.lru_cache(maxsize=4096)
def _words(component: str) -> tuple[str, ...]:
    """The words of a component of a path, without numbers.

    >>> _words("TokenEmbed_0"), _words("lm_head"), _words("LMHead"), _words("conv2d")
    (('token', 'embed'), ('lm', 'head'), ('lm', 'head'), ('conv', 'd'))
    """
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", component)
    return tuple(word.lower() for word in found)


@functools.lru_cache(maxsize=4096)
def components(path: str) -> tuple[tuple[str, ...], ...]:
    """The words of the components that have any, of the name, of its module and so on."""
    return tuple(words for part in reversed(path.split("/")) if (words := _words(part)))


def is_vector(site: Site) -> str:
    """Why a leaf is a vector, of however many axes, or nothing."""
    *modules, name = site.called.split("/")
    words = _words(name)
    if site.said == "vector":
        return f"of a {site.module}"
    if len(site.shape) < 2:
        return "vector"
    if site.said:
        return ""
    # `relative_position_bias_table` is none, `bias_ih` is.
    if words and (words[-1] in _VECTORS or (words[0] == "bias" and words[-1] not in _TABLES)):
        return "its name"
    module = next(iter(components("/".join(modules))), ("",))
    if (module[-1] in _NORMS or "ln" in module) and words in (("weight",), ("w",), ("g",)):
        return "of a norm"
    if words[:1] == ("b",) and (module[-1] == "bias" or _is_beside_a_kernel(site)):
        return "beside a kernel"
    if words == ("weight", "g"):
        return "its name"
    return ""


def _is_beside_a_kernel(site: Site) -> bool:
    """Whether a `b` is the bias of a kernel; an error if nothing tells."""
    *modules, _ = site.called.split("/")
    for other, shape in site.beside.items():
        is_kernel = _words(other)[:1] in (("w",), ("weight",), ("kernel",))
        if is_kernel and (shape is None or shape[-1:] == site.shape[-1:]):
            return True
    # `a`, `b`, … count matrices, as of LoRA.
    is_counted = "a" in map(str.lower, site.beside)
    if modules and not is_counted and not site.is_exact and _num_sides(site) > 1:
        raise ValueError(
            f"Leaf '{site.path}' of shape {site.shape} may be biases or a matrix. Say which: "
            f"roles={{'{site.path}': 'bias'}}, or 'hidden'."
        )
    return False


def kind_of(site: Site) -> tuple[str, str]:
    """The role of a leaf that is no vector by its name, and why; an error if it is in doubt."""
    *_, name = site.called.split("/")
    of_head, of_table = _is_head(site), _is_table(site)
    if of_head and not _ATTENTION.isdisjoint(itertools.chain(*components(site.called))):
        raise ValueError(
            f"Leaf '{site.path}' of shape {site.shape} may belong to a head of attention, or to "
            f"the head of the network. Say which: roles={{'{site.path}': 'hidden'}}, or 'head'."
        )
    if of_table and of_head:
        raise ValueError(
            f"Leaf '{site.path}' of shape {site.shape} is called after a head and after a table of "
            f"embeddings. Say which it is: roles={{'{site.path}': 'head'}}, or 'embedding' or "
            "'hidden'."
        )
    if of_table:
        return "embedding", f"of an {site.module}" if site.said else "its path"
    if of_head:
        return "head", "its path"
    is_kernel = "/" in site.called and name in KERNELS
    if _num_sides(site) < 2 and not (is_kernel or site.is_exact):
        return "bias", "an axis of length 1"
    is_extreme = len(site.shape) == 2 and max(site.shape) > _MAX_ASPECT_RATIO * min(site.shape) > 0
    if is_extreme and name != "kernel" and not site.said:
        raise ValueError(
            f"Leaf '{site.path}' of shape {site.shape} looks like a table of embeddings, with one "
            f"side more than {_MAX_ASPECT_RATIO} times the other. Say what it is: "
            f"roles={{'{site.path}': 'embedding'}}, or 'hidden' or 'head'."
        )
    return "hidden", _why_matrix(site)


def _num_sides(site: Site) -> int:
    """The number of axes that are not of length 1."""
    return sum(size != 1 for size in site.shape)


def _why_matrix(site: Site) -> str:
    if site.is_unreadable:
        return f"{len(site.shape)} axes: needs dimension_numbers"
    if site.parts or isinstance(site.numbers, Grouped):
        return str(site.parts or site.numbers)
    if math.prod(site.window) == 1:
        return "matrix" if site.layout != "axes" else "its dimension_numbers"
    window = f"window {'×'.join(map(str, site.window))}"
    if site.layout in ("in_out", "out_in"):
        return f"{window}, of grey images" if site.channels[0] == 1 else window
    return f"{window}, {site.layout}"


def _is_head(site: Site) -> bool:
    """Whether a component is called after a head, and not after heads of attention."""
    return any(c[-1] in _HEADS and c[-2:] != ("multi", "head") for c in components(site.called))


def _is_table(site: Site) -> bool:
    """Whether a leaf is called after a table of embeddings; an error if its path leaves it open."""
    if site.said or not set(site.shape[:-2]) <= {1}:
        return site.said == "table"
    name = site.name
    # A kernel is called after its module.
    called, *around = components(site.called)[name in KERNELS :] or ((),)
    if name in ("kernel", "recurrent_kernel"):
        if _INDICES.isdisjoint(called) or not _is_called_table(called):
            return False
    elif _is_called_table(called):
        return True
    elif name not in KERNELS:
        is_added = called[-1:] in (("token",), ("tokens",)) or not _POSITIONS.isdisjoint(called)
        if is_added or any(map(_is_called_table, around[:1])):
            return True
    if all(_TABLES.isdisjoint(component) for component in (called, *around)):
        return False
    if _is_head(site):
        return True  # and a head: both is in doubt
    raise ValueError(
        f"Leaf '{site.path}' of shape {site.shape} may be a table of embeddings, or a matrix in a "
        f"module that is called after one. Say which: roles={{'{site.path}': 'embedding'}}, or "
        "'hidden'."
    )


def _is_called_table(component: tuple[str, ...]) -> bool:
    """Whether a component is called after a table: `tok_embeddings`, `embed_tokens`."""
    while component and component[-1] in _AFTER_TABLES:
        component = component[:-1]
    return bool(component) and component[-1] in _TABLES


def check_axes(sites: Sequence[Site]) -> None:
    """Error for a leaf of which it is in doubt which axes are fan-in, fan-out and window.

    Args:
        sites: The leaves that are matrices. What one is may depend on the others.
    """
    for site in sites:
        if len(site.shape) < 2:
            continue
        cut_of(site)
        if site.said == "matrix" and site.is_exact:
            continue
        leaf, say = site.named, f"dimension_numbers={{'{site.path}'"
        is_window = math.prod(site.window) > 1 and not site.is_unreadable
        num_in, num_out = site.channels
        if is_window and num_in == 1 and _is_not_the_first(site, sites):
            raise ValueError(
                f"{leaf} may be a depthwise convolution, whose channels no matrix may mix, or the "
                f"first of grey images. Say which: {say}: 'depthwise'}} of (*window, 1, channels), "
                "dm.layers.Grouped(channels, 'out_in') of (channels, 1, *window), or "
                "dm.layers.Grouped(1) of one group."
            )
        if site.is_exact:
            continue
        if site.said == "matrix":
            raise ValueError(
                f"{leaf} has more axes than the weight of one {site.module}. If layers are stacked "
                "there, say so in dm.layers_by_path, with dm.stacked, and use a drop_ optimizer or "
                f"dm.per_layer; of an ensemble say the axes, {say}: "
                "optax.contrib.MuonDimensionNumbers(reduction_axis=…, output_axis=…)}."
            )
        is_turned = len(site.shape) == 2 and num_in != num_out and [num_in] in site.biases
        if is_turned or (site.numbers is None and site.name in NAMES_IN_DOUBT):
            hint = f", as the bias of length {num_in} beside it says" if is_turned else ""
            raise ValueError(
                f"{leaf} may be kept as (out, in, *window), as in Equinox and PyTorch, or as "
                f"(*window, in, out), as in Flax{hint}. Say it with dimension_numbers='out_in' or "
                f"'in_out', for the whole tree, or by pattern, {{'{site.path}': 'out_in'}}; "
                "dm.matrix_labels and dm.Roles take them too."
            )
        if is_window and not _is_convolution(site):
            raise ValueError(
                f"{leaf} may be a convolution with a window of {'×'.join(map(str, site.window))}, "
                f"or a stack of attention or expert kernels. Of a convolution say {say}: 'in_out'}}"
                ", or another layout; of a stack the axes, optax.contrib.MuonDimensionNumbers("
                "reduction_axis=…, output_axis=…)."
            )
        if len(site.shape) > 2 and not site.is_unreadable and (doubt := _other_kind(site)):
            raise ValueError(
                f"{leaf} may be a {doubt}. Say which: {say}: 'in_out'}} of an ordinary convolution "
                "(*window, in, out), 'out_in' of (out, in, *window), 'transposed' of (*window, out,"
                " in), 'depthwise' of (*window, 1, channels) and (*window, channels, multiplier), "
                "or dm.layers.Grouped(groups) of one in groups."
            )


def _is_convolution(site: Site) -> bool:
    """Whether both the window and the path of a leaf are those of a convolution."""
    sides = {size for size in site.window if size != 1}
    if len(sides) > 1 or max(sides) > _MAX_WINDOW:
        return False
    *modules, name = site.called.split("/")
    if not modules and name == "kernel":  # the parameters of a single layer
        return True
    # A layer in a list has a number only; its leading axes are not those of a scan.
    if name == "kernel" and modules and not _words(modules[-1]) and max(sides) % 2:
        return True
    own = components("/".join(modules or [name]))
    return not _CONVOLUTIONS.isdisjoint(own[0] if own else ())


def _other_kind(site: Site) -> str:
    """What a convolution may be besides an ordinary one, or nothing."""
    if site.layout not in ("in_out", "out_in") or isinstance(site.numbers, Grouped):
        return ""
    words = {*itertools.chain(*components(site.called)[:2])}
    is_called_transposed = not words.isdisjoint(("transpose", "transposed", "deconv"))
    (num_in, num_out), biases = site.channels, site.biases
    if math.prod(site.window) == 1 and (not is_called_transposed or num_in == num_out):
        return ""  # one matrix in all layouts, or its transpose on the same scale
    for bias in biases:
        if bias not in ([num_out], [], None):
            return f"convolution of another kind, with a bias of shape {tuple(bias)} beside it"
    is_told = bool(biases) and (None in biases or num_in != num_out)
    if is_called_transposed and not is_told:
        return (
            "transposed convolution, which Haiku, Keras and Flax with transpose_kernel=True keep "
            "as (*window, out, in)"
        )
    if not words.isdisjoint(("depthwise", "separable")) or ("dw" in words and num_in == 1):
        return "depthwise convolution, whose channels no matrix may mix"
    if not words.isdisjoint(("group", "grouped", "groups")):
        return "convolution in groups, each of which has a matrix of its own"
    if num_out == 1 < num_in and not biases and not _is_head(site):
        return "depthwise convolution, as Keras keeps it, or one of one channel out"
    return ""


def _is_not_the_first(site: Site, sites: Sequence[Site]) -> bool:
    """Whether another convolution comes first, so that this one is not that of grey images."""
    made = {other.channels[1] for other in sites if len(other.shape) > 1}

    def number(path: str) -> tuple[str, list[int]]:
        return re.sub(r"\d+", "#", path), [int(digits) for digits in re.findall(r"\d+", path)]

    def comes_first(other: Site) -> bool:
        (family, place), (own_family, own_place) = number(other.path), number(site.path)
        channels = other.channels[0]
        takes_colours = channels <= 4 and channels not in made
        return channels == 1 or takes_colours or (family == own_family and place < own_place)

    ordinary = [
        other
        for other in sites
        if math.prod(other.window) > 1 and other.numbers in (None, "in_out", "out_in")
    ]
    return site in ordinary and any(comes_first(x) for x in ordinary if x is not site)
