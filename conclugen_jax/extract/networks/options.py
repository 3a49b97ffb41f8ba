"""Options of networks, as folders of converted weights store them."""

from typing import Annotated, Literal

import msgspec

from conclugen_jax.extract.networks import text_encoder

Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1024)]


class NoOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Of networks whose name says everything."""


class TextOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Attributes of :class:`conclugen_jax.extract.networks.text_encoder.TextEncoder`."""

    vocabulary: Size
    width: Size
    num_layers: Size
    num_heads: Size
    hidden_dim: Size
    max_positions: Size
    activation: Literal[tuple(text_encoder.ACTIVATIONS)]
    epsilon: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    first_position: Count
    num_types: Count


class DavenetOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Attributes of :class:`conclugen_jax.extract.networks.davenet.ResDAVEnet`."""

    widths: Annotated[list[Annotated[int, msgspec.Meta(ge=1, le=2**14)]], msgspec.Meta(min_length=5, max_length=5)]
    kernel_mels: Annotated[int, msgspec.Meta(ge=1, le=1024)]


OPTIONS = {"text": TextOptions, "resdavenet": DavenetOptions}
"""Network -> type of its options; all others have none."""
