"""TokenStreams: which module encloses a running layer, and the positions it was called with."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.model.call import Call, Reader, lead, real_positions
from curvfast.model.hooking import Removable, in_transform, watch_forward
from curvfast.model.layer import LinearLayer
from curvfast.model.stream import DECODER, IMAGE, SOURCE, TEXT, TokenStream


@dataclass(eq=False)
class Frame:
    """A running call of a module, and the token streams it was told of."""

    stream: TokenStream
    """What its rows stand for, its own or that of the calls around it."""
    outer: Frame | None = None
    decoder: TokenStream | None = None
    """What its decoder reads, if it is an encoder and a decoder."""
    source: TokenStream | None = None
    """What the encoder's states stand for that it was given."""
    states: weakref.ref[Tensor] | None = None
    """Those states."""
    sequence_first: bool | None = None
    """Whether the module says that positions come before sequences; None: it says nothing."""
    exchanged: set[str] = field(default_factory=set)
    """Layers that were once seen to have positions before sequences; shared by all frames."""
    made: list[tuple[weakref.ref[Tensor], TokenStream]] = field(default_factory=list)
    """Outputs of the calls inside it that are over, and what their rows stand for."""

    def chain(self) -> Iterator[Frame]:
        """Yield this call and those around it."""
        frame: Frame | None = self
        while frame is not None:
            yield frame
            frame = frame.outer

    def stream_of(self, x: Tensor) -> TokenStream | None:
        """Return what the rows of x stand for if x is another's states, or a view of them.

        Args:
            x: The input of a layer.
        """
        for frame in self.chain():
            states = None if frame.states is None else frame.states()
            if states is not None and _same_memory(x, states):
                return frame.source
            for made, stream in reversed(frame.made):
                output = made()
                if output is not None and _same_memory(x, output):
                    return stream
        return None

    def candidates(self, x: Tensor) -> list[TokenStream]:
        """Return what the rows of x may stand for, the likeliest first.

        Args:
            x: The input of a layer.
        """
        known = self.stream_of(x)
        if known is not None:
            return [known]
        last = self.made[-1][1] if self.made else None
        if self.decoder is None:
            # Of a sound, an inner call alone may know which of its frames are padding.
            framed = last is not None and self.stream.role == IMAGE and last.role == SOURCE
            return [last] if last and framed and last.grid == x.shape[:-1] else [self.stream]
        # Between encoder and decoder the states are the encoder's, after the decoder its.
        both = [self.decoder, self.stream]
        return [each for each in both if last is None or each.role == last.role]

    def others(self) -> list[TokenStream]:
        """Return the other streams that were told of: the encoder's, those of outer calls."""
        found = [each for f in self.chain() for each in (f.source, f.stream, f.decoder) if each]
        return list(dict.fromkeys(found))


class TokenStreams:
    """Hooks on the modules that enclose chosen layers and are called with masks or positions."""

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[LinearLayer],
        opened: Callable[[nn.Module, Call], None] | None = None,
        closed: Callable[[nn.Module, Any], None] | None = None,
    ) -> None:
        """Find the modules; :meth:`attach` registers the hooks.

        Args:
            model: The model.
            layers: The chosen layers.
            opened: Called when a module is called from outside of all others, before its forward.
            closed: Called when that call is over, with its output, None if it raised.
        """
        self._model, self._opened, self._closed = model, opened, closed
        chosen = {id(layer.module) for layer in layers}
        modules = _enclosing(model, chosen)
        self._readers = {m: Reader(m) for m in modules}
        self._hooked = [m for m in modules if m is model or self._readers[m].tells]
        self._stack: list[tuple[nn.Module, Frame]] = []
        self._streams: dict[Any, TokenStream] = {}
        self._exchanged: set[str] = set()
        self._handles: list[Removable] = []

    def attach(self) -> None:
        """Register the hooks."""
        for module in self._hooked:
            hooks = watch_forward(module, self._leave, before=self._enter, always=True)
            self._handles.append(hooks)

    def remove(self) -> None:
        """Remove every hook, and forget what is running."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.reset()

    def forget(self) -> None:
        """Release the callbacks: nothing is told any more, and nothing kept alive."""
        self._opened = self._closed = None

    def reset(self) -> None:
        """Forget what is running: what an interrupted forward left."""
        self._stack.clear()
        self._streams.clear()

    def current(self) -> Frame | None:
        """Return the innermost running call, or None outside of all, and in a recomputation."""
        return self._stack[-1][1] if self._stack and not recomputing() else None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recomputing() or in_transform():
            # The calls around it are long over, and layers remember theirs; or nothing counts.
            return
        if not self._stack or module is self._model:
            self.reset()  # a KeyboardInterrupt runs no hook
        call = self._readers[module].read(args, kwargs)
        if not self._stack and self._opened is not None:
            self._opened(module, call)
        outer = self._stack[-1][1] if self._stack else None
        self._stack.append((module, self._frame(module, call, outer)))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        places = [i for i, (each, _) in enumerate(self._stack) if each is module]
        place = places[-1] if places else None
        if recomputing() or place is None:
            return
        frame = self._stack[place][1]
        # What lies above was left without a word: its hook did not run.
        del self._stack[place:]
        outer = self._stack[-1][1] if self._stack else None
        if outer is frame:
            return
        if outer is not None and (outer.decoder or frame.stream is not outer.stream):
            outer.made += [(weakref.ref(each), frame.stream) for each in _outputs(output)]
        elif outer is not None:
            outer.made += frame.made[-1:]
        if not self._stack:
            self._streams.clear()
            if self._closed is not None:
                self._closed(module, output)

    def _frame(self, module: nn.Module, call: Call, outer: Frame | None) -> Frame:
        by = type(module).__name__
        stream = self._main(call, outer, by)
        sequence_first = _sequence_first(module)
        if sequence_first is None and outer is not None and stream is outer.stream:
            sequence_first = outer.sequence_first
        decoder = self._decoder(call, outer, by) if call.decodes else None
        source = self._source(call, outer, by)
        plain = outer is not None and decoder is None is outer.decoder
        if outer is not None and plain and sequence_first == outer.sequence_first:
            if stream is outer.stream and source in (None, outer.source):
                return outer  # it tells nothing new
        states = None if source is None or call.source is None else weakref.ref(call.source)
        return Frame(stream, outer, decoder, source, states, sequence_first, self._exchanged)

    def _main(self, call: Call, outer: Frame | None, by: str) -> TokenStream:
        """Return the stream of a call's own tokens."""
        if call.image:
            if outer is not None and outer.stream.role == IMAGE:
                return outer.stream
            return self._once(TokenStream(f"{by}, called with floats only", role=IMAGE))
        inside = outer is not None and outer.stream.role == IMAGE and call.ids is None
        if outer is not None and inside and call.mask is None:
            return outer.stream
        # What is padded of an image or a sound is real or not, and predicts nothing.
        role = SOURCE if call.decodes or inside else TEXT
        near = self._inherited(call, outer)
        if near is None and outer is not None and _says_nothing(call):
            return outer.stream
        grid = call.grid
        if call.ids is None and call.mask is None and grid is not None and len(grid) < 2:
            grid = None  # rows [n, d]: no sequence
        if grid is not None and call.mask is not None and call.mask.shape != grid:
            grid = call.mask.shape  # the tokens are [length, sequences]
        if grid is None and call.mask is not None:
            grid = call.mask.shape
        if near is not None:
            if call.mask is None or _same_memory(call.mask, near.raw_mask):
                return self._with_labels(near, call, grid)
            role = near.role
        problem = None
        known = near is not None or (outer is not None and outer.stream.grid == grid)
        if call.mask is None and call.pattern is not None and not known:
            problem = (
                f"{by} was called with a mask {list(call.pattern.shape)}; the real positions are "
                f"read from one of its tokens, {list(grid or ())}"
            )
        if near is not None and near.grid == grid:
            base = replace(near, role=role, _kept={})
        else:
            base = TokenStream(by, role=role)
        stream = replace(
            base,
            by=f"{call.mask_name or 'no mask'} of {by}",
            grid=grid,
            mask=None if call.mask is None else real_positions(call.mask_name, call.mask),
            raw_mask=call.mask,
            documents=_documents(call.mask),
            problem=problem,
            _kept={},
            **_given(call.tokens),
        )  # fmt: skip
        return self._with_labels(stream, call, grid)

    def _inherited(self, call: Call, outer: Frame | None) -> TokenStream | None:
        """Return the stream of an outer call that a call's tokens are of, if they are."""
        if outer is None or call.tokens is None:
            return None
        known = [each for f in outer.chain() for each in (f.stream, f.decoder) if each is not None]
        for each in known:
            if _same_memory(call.tokens, each.given()):
                return each
        for each in known:
            if call.mask is not None and _same_memory(call.mask, each.raw_mask):
                return each
        grid = call.grid
        whole = next((f for f in outer.chain() if f.decoder is not None), None)
        if whole is None:
            same = outer.stream.grid in (grid, grid[::-1] if grid is not None else None)
            # Ids of their own are other tokens; states of the same shape are the outer's.
            floats = call.tokens.is_floating_point()
            return outer.stream if same and floats and outer.stream.role != IMAGE else None
        if outer is whole or outer.stream.role not in (SOURCE, DECODER):
            decoder = whole.decoder
            after = call.source is not None or bool(outer.made)  # the encoder is called first
            unread = decoder is not None and decoder.tokens is None and decoder.states is None
            if decoder is not None and unread and after and decoder.grid in (None, grid):
                # Made of the labels by the model itself.
                return replace(decoder, grid=grid, **_given(call.tokens), _kept={})
            return None
        return (
            outer.stream if outer.stream.grid == grid and call.tokens.is_floating_point() else None
        )

    def _with_labels(self, stream: TokenStream, call: Call, grid: torch.Size | None) -> TokenStream:
        """Return a stream with what else a call says of its positions."""
        found: dict[str, Any] = {}
        if grid is None:
            return self._once(stream)
        if stream.role != SOURCE and stream.labels is None and stream.shift_labels is None:
            for name in ("labels", "shift_labels"):
                own = getattr(call, name)
                if own is not None and own.shape == grid and not own.is_floating_point():
                    found[name] = own.detach()
        ids = call.position_ids
        if ids is not None and stream.position_ids is None and not _says_nothing(call):
            # The first of four rows are those of text, the others of places in an image.
            own = ids[0] if ids.dim() == 3 and ids.shape[0] == 4 else ids
            if own.shape == grid:
                found["position_ids"] = own.detach()
        if call.ends is not None and stream.ends is None and call.ends.dim() == 1:
            found["ends"] = call.ends.detach()
        return self._once(replace(stream, **found, _kept={}) if found else stream)

    def _decoder(self, call: Call, outer: Frame | None, by: str) -> TokenStream:
        own = self._own_decoder(call, by)
        around = next((f.decoder for f in outer.chain() if f.decoder), None) if outer else None
        if around is None or own.labels is not None or around.grid not in (None, own.grid):
            return own
        said = (own.mask, own.tokens, own.states)
        if own.grid is None or all(each is None for each in said):
            return around
        masked = own if own.mask is not None else around
        return self._once(
            replace(
                own, by=masked.by, labels=around.labels, mask=masked.mask,
                raw_mask=masked.raw_mask, _kept={},
            )
        )  # fmt: skip

    def _own_decoder(self, call: Call, by: str) -> TokenStream:
        labels = call.labels if call.labels is not None and call.labels.dim() >= 2 else None
        if labels is not None and labels.is_floating_point():
            labels = None
        grid = None
        if call.decoder is not None:
            grid = lead(call.decoder)
            if call.decoder_mask is not None and call.decoder_mask.shape != grid:
                grid = call.decoder_mask.shape
        elif call.decoder_mask is not None:
            grid = call.decoder_mask.shape
        elif labels is not None:
            grid = labels.shape
        masked = call.decoder_mask
        name = call.decoder_mask_name
        told = f"{name} of {by}" if masked is not None else f"the labels of {by}"
        return self._once(
            TokenStream(
                told if masked is not None or labels is not None else f"the decoder of {by}",
                grid=grid,
                role=DECODER,
                mask=None if masked is None else real_positions(name, masked),
                raw_mask=masked,
                labels=labels.detach() if labels is not None and labels.shape == grid else None,
                **_given(call.decoder),
            )
        )

    def _source(self, call: Call, outer: Frame | None, by: str) -> TokenStream | None:
        """Return the stream of the encoder's states that a call was given."""
        states = call.source
        if states is None:
            return None
        known = outer.stream_of(states) if outer is not None else None
        grid = lead(states)
        mask = call.source_mask
        if mask is None:
            if known is not None:
                return known
            for frame in outer.chain() if outer is not None else ():
                same = frame.stream.grid in (grid, grid[::-1])
                if frame.decoder is not None and same and frame.stream.role == SOURCE:
                    return frame.stream
            return self._once(TokenStream(f"the encoder's states in {by}", grid, SOURCE))
        if known is not None and _same_memory(mask, known.raw_mask):
            return known
        name = call.source_mask_name
        own = TokenStream(
            f"{name} of {by}", mask.shape, SOURCE, real_positions(name, mask), raw_mask=mask
        )
        return self._once(own)

    def _once(self, stream: TokenStream) -> TokenStream:
        """Return one object for equal streams of one batch, so that their rows are shared."""
        labels = (stream.labels, stream.shift_labels)
        parts = (stream.raw_mask, *labels, stream.position_ids, stream.ends)
        memory = tuple(None if each is None else _memory(each) for each in parts)
        given = None if stream.mask is not None else stream.given()
        token = None if given is None else (id(given), _memory(given))
        key = (stream.grid, stream.role, stream.problem, memory, token)
        return self._streams.setdefault(key, stream)


def recomputing() -> bool:
    """Return whether a backward is running: a forward in it is one of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def _enclosing(model: nn.Module, chosen: set[int]) -> list[nn.Module]:
    """Return the modules around chosen ones, the model first."""
    memo: dict[int, bool] = {}
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> bool:
        if id(module) not in memo:
            memo[id(module)] = id(module) in chosen
            place = len(found)
            inside = [visit(child) for child in module.children()]
            if any(inside):
                found.insert(place, module)
            memo[id(module)] |= any(inside)
        return memo[id(module)]

    visit(model)
    return found if model in found else [model, *found]


def _sequence_first(module: nn.Module) -> bool | None:
    """Return whether torch's own module takes [length, sequences, d]."""
    for each in (module, getattr(module, "self_attn", None)):
        batch_first = getattr(each, "batch_first", None)
        if isinstance(batch_first, bool):
            return not batch_first
    stack = getattr(module, "layers", None)
    if isinstance(stack, nn.ModuleList) and len(stack):
        return _sequence_first(stack[0]) if not isinstance(stack[0], nn.ModuleList) else None
    return None


def _given(tokens: Tensor | None) -> dict[str, Any]:
    """Return ids as what is held, and floats as what is not: they may be large."""
    if tokens is None or not tokens.is_floating_point():
        return {"tokens": tokens, "states": None}
    return {"tokens": None, "states": weakref.ref(tokens)}


def _says_nothing(call: Call) -> bool:
    """Return whether a call gives neither ids nor a mask of its own, nor a whole model's input."""
    return call.mask is None and call.ids is None and not call.embedded


def _documents(mask: Tensor | None) -> Tensor | None:
    """Return a mask whose values may number documents."""
    plain = mask is None or mask.dtype == torch.bool or mask.is_floating_point()
    return None if plain else mask.detach()  # type: ignore[union-attr]


def _memory(x: Tensor) -> tuple[Any, ...]:
    return (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride())


def _same_memory(one: Tensor, two: Tensor | None) -> bool:
    """Return whether one tensor is the other, or a view of all of it."""
    if two is None or one.numel() != two.numel():
        return False
    if one is two:
        return True
    return (
        one.untyped_storage()._cdata == two.untyped_storage()._cdata
        and one.storage_offset() == two.storage_offset()
        and one.dtype == two.dtype
    )


def _outputs(output: Any) -> list[Tensor]:
    """Return the floats of an output that may be passed on."""
    values = output.values() if isinstance(output, Mapping) else output
    several = isinstance(values, Iterable) and not isinstance(values, Tensor)
    few = list(values)[:2] if several else [values]
    return [t for t in few if isinstance(t, Tensor) and t.is_floating_point()]
