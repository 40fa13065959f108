"""Head: which likelihood the outputs of a model parametrise, asked of the model and its batch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.collection.likelihood import BERNOULLI, LIKELIHOODS, NORMAL, SOFTMAX, Likelihood
from curvfast.errors import InputError, ShapeError
from curvfast.kfac.known import CONVENTION, TOLD
from curvfast.model.identity import unwrap

# Heads of transformers whose loss goes by config.problem_type, and that count config.num_labels.
_BY_PROBLEM = re.compile("For(Sequence|Image|Audio|Video)Classification")
_BY_LABELS = re.compile(
    "For((Sequence|Image|Audio|Video|Token)Classification|SemanticSegmentation)"
)
_PASSING = ("ToCopyBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
_OF_PROBLEM = {
    "regression": NORMAL,
    "single_label_classification": SOFTMAX,
    "multi_label_classification": BERNOULLI,
}
_WAY_OUT = (
    "pass likelihood='softmax' (class_axis= says where the classes are), 'bernoulli' for "
    "independent labels, or 'normal' for a regression"
)


@dataclass(frozen=True)
class Said:
    """What the caller says of a head."""

    likelihood: str | None = None
    """One of :data:`LIKELIHOODS`; None asks the model."""
    class_axis: int | None = None
    """Axis of the classes; None asks the model and the batch."""

    def __post_init__(self) -> None:
        """Check both.

        Raises:
            InputError: If one is unknown, or the axis is of no softmax.
        """
        if self.likelihood is not None and self.likelihood not in LIKELIHOODS:
            raise InputError(
                f"likelihood={self.likelihood!r}: pass 'softmax' (cross-entropy), 'bernoulli' "
                "(binary cross-entropy with logits), 'normal' (½(y − f)²), or None"
            )
        if self.class_axis not in (None, -1, 1):
            raise InputError(f"class_axis={self.class_axis}: pass -1 or 1")
        if self.class_axis is not None and self.likelihood not in (None, SOFTMAX):
            raise InputError(
                f"class_axis={self.class_axis} is of likelihood='softmax', and "
                f"likelihood={self.likelihood!r} was passed: leave one of them out"
            )


def likelihood_of(
    model: nn.Module,
    outputs: torch.Size,
    labels: Tensor | None,
    positions: Sequence[torch.Size],
    said: Said = Said(),
    made: int | None = None,
) -> Likelihood:
    """Return the likelihood that the outputs of a model parametrise.

    Args:
        model: Asked by the class and configuration of transformers' heads.
        outputs: The shape of its logits.
        labels: Labels of the batch, if there are any.
        positions: Leading shapes of the model's input, such as [sequences, length].
        said: What the caller says; it overrides the model.
        made: Axis of features of the layer that made the outputs, where :func:`made_axis` knows it.

    Raises:
        InputError: If nothing says what a head of one output is, or classes are not as many as
            the model says.
        ShapeError: If classes fit on two axes, or on none.
    """
    head = _head(model)
    kind = _Kind.of(head)
    name, by, how = _name(kind, outputs, labels, said)
    if name != SOFTMAX:
        return Likelihood(name, by, how, _output_axis(kind, outputs, positions))
    if len(outputs) < 2:
        raise ShapeError(
            f"the model returned {list(outputs)} logits, and a softmax needs [..., classes]: "
            + _WAY_OUT
        )
    axis, axis_by = _class_axis(kind, outputs, labels, positions, said, made)
    _require_classes(kind, outputs, axis, said)
    return Likelihood(name, ", ".join(dict.fromkeys([by, axis_by])) if axis_by else by, how, axis)


def made_axis(outputs: Tensor) -> int | None:
    """Return the axis of features of the linear or convolutional layer that made outputs.

    Args:
        outputs: With their graph; None of those that went through anything else.
    """
    node: Any = outputs.grad_fn
    while type(node).__name__ in _PASSING:
        node = node.next_functions[0][0]
    name = type(node).__name__
    if name == "ConvolutionBackward0":
        return 1
    if name in ("LinearBackward0", "_StartBackward"):
        return -1
    sizes = getattr(node, "_saved_mat2_sym_sizes", (None,))
    return (
        -1 if name in ("AddmmBackward0", "MmBackward0") and sizes[-1] == outputs.shape[-1] else None
    )


@dataclass(frozen=True)
class _Kind:
    """What transformers' conventions say of a head; nothing, of other libraries' models."""

    name: str
    """Class of the head."""
    problem: str | None
    """``config.problem_type`` of a head whose loss goes by it."""
    by_problem: bool
    classes: int | None
    """``config.num_labels`` of a head whose outputs are as many."""
    vocabulary: frozenset[int]
    """Widths that a language head may have."""

    @classmethod
    def of(cls, head: nn.Module) -> _Kind:
        config = getattr(head, "config", None)
        name = next(
            (c.__name__ for c in type(head).__mro__ if _BY_LABELS.search(c.__name__)),
            type(head).__name__,
        )
        counted = config is not None and _BY_LABELS.search(name)
        by_problem = config is not None and bool(_BY_PROBLEM.search(name))
        return cls(
            name,
            getattr(config, "problem_type", None) if by_problem else None,
            by_problem,
            getattr(config, "num_labels", None) if counted else None,
            _vocabulary(head, config),
        )


def _head(model: nn.Module) -> nn.Module:
    """Return the outermost module with a configuration, where wrappers and PEFT have none."""
    inner: Any = unwrap(model)
    base = getattr(inner, "get_base_model", None)
    inner = base() if callable(base) else inner
    for module in inner.modules():
        if hasattr(getattr(module, "config", None), "num_labels"):
            return module  # type: ignore[no-any-return]
    return inner  # type: ignore[no-any-return]


def _vocabulary(head: nn.Module, config: Any) -> frozenset[int]:
    find = getattr(head, "get_output_embeddings", None)
    try:
        unembedding = find() if callable(find) else None
    except (AttributeError, NotImplementedError):
        unembedding = None
    weight = getattr(unembedding, "weight", None)
    if weight is None:
        return frozenset()
    text = getattr(config, "text_config", None)
    sizes = {getattr(c, "vocab_size", None) for c in (config, text)}
    sizes |= {getattr(unembedding, "out_features", None), weight.shape[0]}
    return frozenset(size for size in sizes if isinstance(size, int))


def _name(
    kind: _Kind, outputs: torch.Size, labels: Tensor | None, said: Said
) -> tuple[str, str, str]:
    """Return the likelihood, who says so, and how sure that is."""
    if said.likelihood is not None:
        return said.likelihood, f"likelihood={said.likelihood!r}", TOLD
    if said.class_axis is not None:
        return SOFTMAX, f"class_axis={said.class_axis}", TOLD
    if kind.problem is not None:
        if kind.problem not in _OF_PROBLEM:
            raise InputError(
                f"config.problem_type={kind.problem!r} of {kind.name} is none that transformers "
                f"knows: {_WAY_OUT}"
            )
        return _OF_PROBLEM[kind.problem], f"config.problem_type={kind.problem!r}", CONVENTION
    if kind.by_problem and kind.classes == 1:
        return NORMAL, f"config.num_labels=1 of {kind.name}", CONVENTION
    if kind.by_problem and labels is not None and labels.is_floating_point():
        return BERNOULLI, f"float labels of {kind.name} without problem_type", CONVENTION
    if len(outputs) < 2 or 1 in (outputs[-1], *(outputs[1:2] if len(outputs) > 3 else ())):
        raise InputError(
            f"{kind.name} returned {list(outputs)}, one number a prediction, of which a softmax "
            f"would be certain, and nothing says what it parametrises: {_WAY_OUT}"
        )
    return SOFTMAX, kind.name, CONVENTION


def _output_axis(kind: _Kind, outputs: torch.Size, positions: Sequence[torch.Size]) -> int | None:
    """Return the axis of the outputs of one prediction, or None where each number is one."""
    if len(outputs) < 2 or (outputs in positions and outputs[-1] != kind.classes):
        return None
    return -1


def _class_axis(
    kind: _Kind,
    outputs: torch.Size,
    labels: Tensor | None,
    positions: Sequence[torch.Size],
    said: Said,
    made: int | None,
) -> tuple[int, str]:
    """Return the axis of the classes, and who says so."""
    if said.class_axis is not None:
        return said.class_axis, f"class_axis={said.class_axis}"
    if len(outputs) == 2:
        return -1, ""
    if kind.vocabulary and outputs[-1] in kind.vocabulary:
        return -1, "the width of its output embeddings"
    if len(outputs) == 3 and kind.classes is not None:
        # [sequences, length, classes], whatever the length.
        return -1, ""
    evidence = list(_evidence(kind, outputs, labels, positions))
    for fitting, by in evidence:
        if len(fitting) == 1:
            return fitting[0], by
    if made is not None:
        return made, "the layer that made them"
    if len(outputs) == 3 and not any(fitting for fitting, _ in evidence):
        return -1, ""
    raise ShapeError(
        f"{kind.name} returned {list(outputs)}, and classes may be on axis 1 or on the last one: "
        "neither its config nor the shapes of labels and inputs tell. Pass class_axis=1 or "
        "class_axis=-1"
    )


def _evidence(
    kind: _Kind, outputs: torch.Size, labels: Tensor | None, positions: Sequence[torch.Size]
) -> Iterator[tuple[list[int], str]]:
    """Yield the axes that fit what is known, the best evidence first, and what it is."""
    if "SemanticSegmentation" in kind.name and kind.classes == outputs[1]:
        yield [1], f"config.num_labels of {kind.name}"
    if labels is not None and not labels.is_floating_point():
        yield [a for a in (-1, 1) if _without(outputs, a) == labels.shape], "the shape of labels"
    if kind.classes is not None:
        own = [a for a in (-1, 1) if outputs[a] == kind.classes]
        yield own, f"config.num_labels of {kind.name}"
    yield [a for a in (-1, 1) if _without(outputs, a) in positions], "the shape of the input"


def _without(shape: torch.Size, axis: int) -> torch.Size:
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]


def _require_classes(kind: _Kind, outputs: torch.Size, axis: int, said: Said) -> None:
    classes = outputs[axis]
    if kind.classes is not None and said.class_axis is None and classes != kind.classes:
        raise InputError(
            f"{kind.name} returned {list(outputs)}, {classes} classes on axis {axis}, and its "
            f"config.num_labels is {kind.classes}: say where the classes are by class_axis="
        )
    if classes < 2:
        raise InputError(
            f"{kind.name} returned {list(outputs)}: a softmax of one class is certain, and its "
            f"Fisher zero: {_WAY_OUT}"
        )
