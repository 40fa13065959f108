"""Call: what the arguments of one call of a module say about positions, masks and labels.

Arguments are found by name: in keywords, by position, in catch-alls, and in mappings and objects
that hold a batch. Nothing here waits for a device.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.model.forward import forward_of

MASKS = (
    "attention_mask", "input_mask", "padding_mask", "key_padding_mask", "src_key_padding_mask",
    "src_padding_mask", "pad_mask", "mask",
)  # fmt: skip
DECODER_MASKS = (
    "decoder_attention_mask", "tgt_key_padding_mask", "tgt_padding_mask", "decoder_padding_mask",
)  # fmt: skip
SOURCE_MASKS = (
    "encoder_attention_mask", "memory_key_padding_mask", "encoder_padding_mask",
)  # fmt: skip
IDS = ("input_ids", "src_tokens", "input_tokens", "token_ids", "tokens", "ids", "idx", "src")
EMBEDDED = ("inputs_embeds", "input_embeds", "hidden_states", "src")
DECODER_IDS = ("decoder_input_ids", "prev_output_tokens", "decoder_inputs_embeds", "tgt")
SOURCES = ("encoder_hidden_states", "key_value_states", "memory")
LABELS = ("labels", "shift_labels", "decoder_labels")
POSITIONS = ("position_ids",)
ENDS = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens", "cu_seqlens_q")
COUNT = "num_items_in_batch"

_KNOWN = frozenset(
    (*MASKS, *DECODER_MASKS, *SOURCE_MASKS, *IDS, *EMBEDDED, *DECODER_IDS, *SOURCES, *LABELS,
     *POSITIONS, *ENDS, COUNT)
)  # fmt: skip
_IMAGE = re.compile(r"pixel|image|vision|visual|video|audio|input_features|input_values|grid_thw")
# Integers that are no ids, and masks that are not of padding.
_NO_IDS = re.compile(
    r"mask|label|target|position|type|cache|len|index|indices|choice|lang|bbox|size|num|step|"
    r"^y$|^k$|time|class"
)
_CLOSED = re.compile(r"cache|past|outputs|config|loss")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_DEPTH = 3


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of a module was given."""

    tokens: Tensor | None = None
    """Ids [..., length], or what stands for them, [..., length, d]."""
    tokens_name: str = ""
    mask: Tensor | None = None
    """As it was given, of :attr:`grid`, [sequences, length], or the last columns of it."""
    mask_name: str = ""
    pattern: Tensor | None = None
    """A mask that is not one of positions, such as [sequences, 1, length, length]."""
    position_ids: Tensor | None = None
    ends: Tensor | None = None
    """cu_seq_lens: where each document begins, and where the last ends, [documents + 1]."""
    labels: Tensor | None = None
    shift_labels: Tensor | None = None
    """Labels of the positions that predict them."""
    num_items: Any = None
    """``num_items_in_batch``."""
    image: bool = False
    """Whether it was given an image or a sound, and nothing else that has positions."""
    images_too: bool = False
    """Whether it was given an image or a sound beside tokens, some of which those may replace."""
    decodes: bool = False
    """Whether the module is an encoder and a decoder."""
    decoder: Tensor | None = None
    """What the decoder reads, ids or embeddings."""
    decoder_mask: Tensor | None = None
    decoder_mask_name: str = ""
    source: Tensor | None = None
    """The encoder's states that a decoder was given, [..., length, d]."""
    source_mask: Tensor | None = None
    source_mask_name: str = ""

    @property
    def grid(self) -> torch.Size | None:
        """Leading shape of the tokens."""
        return None if self.tokens is None else lead(self.tokens)

    @property
    def embedded(self) -> bool:
        """Whether a whole model's input was given as floats, not states of some inner layer."""
        return self.tokens_name in ("inputs_embeds", "input_embeds")

    @property
    def ids(self) -> Tensor | None:
        """The ids, if it was called with some."""
        own = self.tokens
        return None if own is None or own.is_floating_point() else own


def lead(tokens: Tensor) -> torch.Size:
    """Return the positions of ids [..., length] or of embeddings [..., length, d]."""
    return tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape


def real_positions(name: str, mask: Tensor) -> Tensor:
    """Return where a mask says that a position is real, bool, of its shape.

    Bool: True is real, but for torch's ``*padding_mask``, whose True is padding. Integers: not 0.
    Floats: 0 is real where the mask is added to scores (some are negative, or all are 0, or it is
    torch's own), else not 0.

    Args:
        name: The argument it was given as.
        mask: Of any dtype.
    """
    mask = mask.detach()
    padding = name.endswith(("padding_mask", "pad_mask"))
    if mask.dtype == torch.bool:
        return ~mask if padding else mask
    if not mask.is_floating_point():
        return mask != 0
    if name.endswith("key_padding_mask"):
        return mask >= 0
    added = (mask < 0).any() | (mask == 0).all()
    return torch.where(added, mask >= 0, mask != 0)


class Reader:
    """Reads the calls of one module by the names of its forward."""

    def __init__(self, module: nn.Module) -> None:
        """Read the signature of the module's forward, once."""
        self._signature = _signature(module)
        kinds = {p.kind for p in self._signature.parameters.values()}
        self.names = frozenset(self._signature.parameters)
        told = any(name in _KNOWN or _IMAGE.search(name) for name in self.names)
        self.tells = told or bool(kinds.intersection(_VARIADIC))
        """Whether a call can say anything of positions."""
        # In torch's own encoders ``mask`` is a pattern [length, length].
        self._patterns = {"mask"} if "src_key_padding_mask" in self.names else set()

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Return what a call says; nothing, where its arguments do not fit the forward.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
        """
        given = dict(self._named(args, kwargs))
        for value in [v for k, v in given.items() if k not in _KNOWN and not _CLOSED.search(k)]:
            _open(value, given, _DEPTH)
        return self._call(given)

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        try:
            bound = self._signature.bind_partial(*args, **kwargs).arguments
        except TypeError:
            bound = dict(kwargs)
        for name, value in bound.items():
            kind = getattr(self._signature.parameters.get(name), "kind", None)
            if kind is inspect.Parameter.VAR_KEYWORD:
                yield from value.items()
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                # Without a name, but what it holds may have some.
                yield from ((f"*{i}", each) for i, each in enumerate(value))
            else:
                yield name, value

    def _call(self, given: Mapping[str, Any]) -> Call:
        # Of a nested tensor not even the shape can be asked.
        tensors = {k: v for k, v in given.items() if isinstance(v, Tensor) and not v.is_nested}
        both = isinstance(given.get("src"), Tensor) and isinstance(given.get("tgt"), Tensor)
        names = self.names | given.keys()
        decodes = both or any(name.startswith("decoder_input") for name in names)
        tokens_name = _tokens(tensors, decodes=decodes)
        tokens = tensors.get(tokens_name)
        image = tokens is None and any(
            _IMAGE.search(k) and v.is_floating_point() for k, v in tensors.items()
        )
        if tokens is not None and tokens.is_floating_point():
            image = bool(_IMAGE.search(tokens_name)) or any(map(_IMAGE.search, tensors))
        own = MASKS if decodes else (*MASKS, *DECODER_MASKS)
        mask_name = _first(tensors, own, self._patterns)
        mask, pattern = _positional(tensors.get(mask_name), tokens, image)
        decoder_mask_name = _first(tensors, DECODER_MASKS) if decodes else ""
        decoder = tensors.get(_first(tensors, DECODER_IDS)) if decodes else None
        source = tensors.get(_first(tensors, SOURCES))
        source_mask_name = _first(tensors, SOURCE_MASKS)
        return Call(
            tokens=None if image else tokens,
            tokens_name=tokens_name,
            mask=mask,
            mask_name=mask_name if mask is not None else "",
            pattern=pattern,
            position_ids=tensors.get("position_ids"),
            ends=tensors.get(_first(tensors, ENDS)),
            labels=tensors.get(_first(tensors, ("labels", "decoder_labels"))),
            shift_labels=tensors.get("shift_labels"),
            num_items=given.get(COUNT),
            image=image,
            images_too=not image
            and any(_IMAGE.search(k) and v.is_floating_point() for k, v in tensors.items()),
            decodes=decodes,
            decoder=decoder,
            decoder_mask=_positional(tensors.get(decoder_mask_name), decoder, False)[0],
            decoder_mask_name=decoder_mask_name,
            source=source if source is not None and source.dim() >= 2 else None,
            source_mask=_positional(tensors.get(source_mask_name), source, False)[0],
            source_mask_name=source_mask_name,
        )


def _tokens(tensors: Mapping[str, Tensor], *, decodes: bool) -> str:
    """Return the name of the argument whose positions the module's rows stand for."""
    known = [*IDS, *EMBEDDED] if decodes else [*IDS, *EMBEDDED, *DECODER_IDS]
    for name in known:
        if name in tensors and tensors[name].dim():
            return name
    for name, value in tensors.items():
        if not value.is_floating_point() and value.dtype not in (torch.bool, torch.uint8):
            taken = name in _KNOWN or name.startswith("*") or _NO_IDS.search(name)
            if value.dim() and not taken:
                return name
    for name, value in tensors.items():
        plain = name not in _KNOWN and not name.startswith("*") and "mask" not in name
        if plain and value.is_floating_point() and value.dim() >= 2 and not _NO_IDS.search(name):
            return name
    return ""


def _first(
    tensors: Mapping[str, Tensor], names: tuple[str, ...], leaving_out: set[str] | None = None
) -> str:
    left = leaving_out or set()
    return next((n for n in names if n in tensors and n not in left), "")


def _positional(
    mask: Tensor | None, tokens: Tensor | None, image: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return a mask as (one of positions, one of another kind)."""
    if mask is None:
        return None, None
    if tokens is None or image:
        return (mask, None) if mask.dim() == 2 and not image else (None, None)
    grid = lead(tokens)
    if mask.shape == grid:
        return mask, None
    if tokens.is_floating_point() and mask.dim() == 2 == len(grid) and mask.shape == grid[::-1]:
        return mask, None
    if mask.dim() == 2 == len(grid) and mask.shape[0] == grid[0] and mask.shape[1] > grid[1]:
        # A cache, or a prefix, stands before the tokens.
        return mask[:, -grid[1] :], None
    return None, mask


def _open(value: Any, into: dict[str, Any], depth: int) -> None:
    """Add what a batch holds by name, where nothing of that name is there yet."""
    if not depth or isinstance(value, Tensor | nn.Module | str | bytes | type):
        return
    inner: Mapping[Any, Any] = {}
    if isinstance(value, Mapping):
        inner = value
    elif isinstance(value, list | tuple) and not hasattr(value, "_asdict"):
        for each in value[:4]:
            if not isinstance(each, Tensor):
                _open(each, into, depth - 1)
        return
    elif hasattr(value, "_asdict"):
        inner = value._asdict()
    elif is_dataclass(value):
        inner = {f.name: getattr(value, f.name, None) for f in fields(value)}
    elif hasattr(value, "__dict__") and not callable(value):
        inner = vars(value)
    own = {k: v for k, v in inner.items() if isinstance(k, str) and not k.startswith("_")}
    for name, each in own.items():
        into.setdefault(name, each)
    for name, each in own.items():
        if name not in _KNOWN and not _CLOSED.search(name):
            _open(each, into, depth - 1)


def _signature(module: nn.Module) -> inspect.Signature:
    """Return the first signature of a module's forward, or of what it wraps, with named arguments.

    A catch-all alone, as of data parallelism, tells nothing of what is passed on by position.
    """
    return forward_of(module).signature
