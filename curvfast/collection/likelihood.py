"""Likelihood: the distribution that a head's outputs parametrise, and its gradients.

A softmax over classes, independent Bernoullis (binary cross-entropy with logits), or N(f, 1), whose
negative log-likelihood is ½(y − f)². With labels drawn from that distribution the second moment of
the gradient is the true Fisher; with given labels it is the empirical Fisher (arXiv 2510.24256;
Kunstner et al., 2019). All gradients are of the summed negative log-likelihood, in closed form: no
loss, no graph over the vocabulary, and never more than a few rows of probabilities in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvfast import ops
from curvfast.errors import InputError, ShapeError
from curvfast.kfac.known import Known
from curvfast.model.rows import IGNORED_LABEL, AllRows, Rows

SOFTMAX, BERNOULLI, NORMAL = "softmax", "bernoulli", "normal"
LIKELIHOODS = (SOFTMAX, BERNOULLI, NORMAL)
MOST_PASSES = 64
"""Most backward passes of one batch that the exact Fisher may take."""

_CHUNK_VALUES = 1 << 19
# What may end a model's head without keeping its output for the backward.
_FORGETFUL = (
    "AddmmBackward0", "BmmBackward0", "LinearBackward0", "MmBackward0", "ReshapeAliasBackward0",
    "ToCopyBackward0", "UnsafeViewBackward0", "ViewBackward0",
)  # fmt: skip


@dataclass(frozen=True)
class Likelihood:
    """The distribution of labels that the outputs of a head parametrise."""

    name: str
    """One of :data:`LIKELIHOODS`."""
    by: str
    """Who says so, such as "config.problem_type"."""
    how: str
    """How sure that is, as in :mod:`curvfast.kfac.known`."""
    axis: int | None = -1
    """Axis of the classes, or of the outputs of one prediction: -1 or 1. None: each number is a
    prediction by itself."""

    @property
    def known(self) -> Known:
        """The rule, who says that it applies, and how sure that is."""
        rule = {
            SOFTMAX: "softmax over the last axis" if self.axis == -1 else "softmax over axis 1",
            BERNOULLI: "independent Bernoullis",
            NORMAL: "normal with variance 1",
        }[self.name]
        return Known(rule, self.by, self.how)

    def predictions(self, shape: torch.Size) -> torch.Size:
        """Return the shape of the predictions that outputs of a shape are."""
        if self.axis is None:
            return shape
        axis = self.axis % len(shape)
        return shape[:axis] + shape[axis + 1 :]

    def sampled(
        self, outputs: Tensor, rows: Rows, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """Draw labels for every prediction that counts; return the gradient.

        Args:
            outputs: Of any float dtype. Overwritten by the gradient where the backward needs its
                values no more.
            rows: Which of the flattened predictions count.
            generator: Draws the labels; on the device of ``outputs``.

        Returns:
            The gradient, of the shape and dtype of ``outputs`` and zero in predictions that do not
            count; and the number of labels, one a prediction.
        """
        values, flat = self._own(outputs)
        if self.name == SOFTMAX:
            index = None if isinstance(rows, AllRows) else rows.indices(flat.device)
            ops.sampled_gradient_(flat, index, generator)
            return self._back(values), rows.count
        kept = rows.take(flat)  # [count, outputs]
        wide = torch.promote_types(flat.dtype, torch.float32)
        device = flat.device
        if self.name == BERNOULLI:
            p = kept.to(wide).sigmoid()
            drawn = torch.rand(kept.shape, dtype=wide, device=device, generator=generator) < p
            own = p - drawn.to(wide)
        else:
            own = torch.randn(kept.shape, dtype=wide, device=device, generator=generator)
        flat.zero_()[rows.indices(flat.device)] = own.to(flat.dtype)
        return self._back(values), rows.count

    def gold(self, outputs: Tensor, labels: Tensor, rows: Rows) -> tuple[Tensor, int]:
        """Return the gradient for given labels.

        Args:
            outputs: Of any float dtype. Overwritten as by :meth:`sampled`.
            labels: Of a softmax, int64 of the shape of the predictions, -100 where there is none,
                or probabilities of the shape of the outputs. Of others, numbers of the shape of the
                outputs, axes of length 1 apart.
            rows: Which of the flattened predictions count; those without a label count nothing.

        Returns:
            The gradient, of the shape and dtype of ``outputs``; and the number of labels.

        Raises:
            ShapeError: If there is not a label for each prediction.
            InputError: If labels are none of this likelihood.
        """
        labels = labels.to(outputs.device)
        if self.name == SOFTMAX and not labels.is_floating_point():
            return self._gold_classes(outputs, labels, rows)
        if labels.shape != outputs.shape and (
            self.name == SOFTMAX or _squeezed(labels.shape) != _squeezed(outputs.shape)
        ):
            raise ShapeError(
                f"labels are {labels.dtype} {list(labels.shape)}, and the model returned "
                f"{list(outputs.shape)}; {self.known.rule} ({self.by}) needs "
                + ("class indices, or probabilities" if self.name == SOFTMAX else "one number")
                + " for each of them: reshape the labels, or pass likelihood="
            )
        values, flat = self._own(outputs)
        _, targets = self._own(labels.reshape(outputs.shape).to(torch.float32))
        self._require_valid(targets)
        step = max(1, _CHUNK_VALUES // flat.shape[1])
        for own, target in zip(flat.split(step), targets.split(step), strict=True):
            own.copy_(self._mean(own) - target)
        return self._back(_only(values, flat, rows)), rows.count

    def _gold_classes(self, outputs: Tensor, labels: Tensor, rows: Rows) -> tuple[Tensor, int]:
        expected = self.predictions(outputs.shape)
        if labels.shape != expected:
            raise ShapeError(
                f"labels are {list(labels.shape)}, and the model predicts {list(expected)} of them "
                f"({self.known.rule} of outputs {list(outputs.shape)}, by {self.by}): a label for "
                "each prediction is needed; resize the labels, or say where the classes are by "
                "class_axis="
            )
        labels = labels.long()
        if not isinstance(rows, AllRows):
            scored = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
            scored[rows.indices(labels.device)] = True
            labels = labels.masked_fill(~scored.view(labels.shape), IGNORED_LABEL)
        if self.axis == -1:
            return label_gradient(outputs, labels)
        values, _ = self._own(outputs)
        gradient, count = label_gradient(values, labels)
        return self._back(gradient), count

    def _require_valid(self, targets: Tensor) -> None:
        if self.name == BERNOULLI and bool(((targets < 0) | (targets > 1)).any()):
            raise InputError(
                "labels of independent Bernoullis must be between 0 and 1: pass "
                "likelihood='softmax' for classes, or 'normal' for a regression"
            )
        if self.name == SOFTMAX and not bool(
            (targets >= 0).all() & ((targets.sum(-1) - 1).abs() < 1e-2).all()
        ):
            raise InputError(
                "float labels of a softmax are probabilities, and a row of these does not sum to "
                "1: pass likelihood='bernoulli' for several labels at once, likelihood='normal' "
                "for a regression, or class indices as integers"
            )

    def _mean(self, flat: Tensor) -> Tensor:
        """Return the expected label of each output, float32 or wider."""
        wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
        if self.name == NORMAL:
            return wide
        return wide.sigmoid() if self.name == BERNOULLI else wide.softmax(-1)

    def exact(self, outputs: Tensor, rows: Rows) -> list[Tensor]:
        """Return gradients whose outer products sum to the Fisher, E over labels, exactly.

        One for each output of each prediction of a sequence: of a softmax √p_k (p − e_k) for class
        k, of Bernoullis √(p (1 − p)), of a normal 1, at one position of every sequence at a time.
        Gradients of two positions of a sequence would mix in the layers below.

        Args:
            outputs: The first dimension is that of sequences.
            rows: Which of the flattened predictions count.

        Raises:
            InputError: If more than :data:`MOST_PASSES` are needed.
        """
        values, flat = self._own(outputs.detach().clone())  # [sequences, *positions, outputs]
        width = flat.shape[1]
        sequences = values.shape[0]
        counted = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        counted[rows.indices(flat.device)] = True
        counted = counted.view(sequences, -1)  # [sequences, positions]
        positions = counted.any(0).nonzero().flatten().tolist()
        if width * len(positions) > MOST_PASSES:
            raise InputError(
                f"labels='exact' needs a backward pass for each of {width} outputs at each of "
                f"{len(positions)} positions of a sequence, at most {MOST_PASSES} in all: pass "
                "labels='sampled', whose mean is the same, or restrict positions by label_mask="
            )
        mean = self._mean(flat)  # [rows, outputs]
        gradients = []
        for position in positions:
            here = torch.zeros_like(counted)
            here[:, position] = counted[:, position]
            for output in range(width):
                own = torch.zeros_like(mean)
                if self.name == SOFTMAX:
                    p = mean[:, output : output + 1]  # [rows, 1]
                    own.copy_(mean)
                    own[:, output] -= 1
                    own *= p.sqrt()
                elif self.name == BERNOULLI:
                    own[:, output] = (mean[:, output] * (1 - mean[:, output])).sqrt()
                else:
                    own[:, output] = 1
                own.masked_fill_(~here.flatten()[:, None], 0)
                gradients.append(self._back(own.to(values.dtype).view(values.shape)))
        return gradients

    def _own(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return values to be written to, their last axis that of outputs, and as [rows, outputs].

        They are the values of ``outputs`` themselves where the backward needs them no more.
        """
        if self.axis is None:
            values = _own_values(outputs)
            return values, values.view(-1, 1)
        if self.axis % outputs.dim() == outputs.dim() - 1:
            values = _own_values(outputs)
            return values, values.view(-1, values.shape[-1])
        values = (
            outputs.detach().movedim(self.axis, -1).clone(memory_format=torch.contiguous_format)
        )
        return values, values.view(-1, values.shape[-1])

    def _back(self, values: Tensor) -> Tensor:
        """Return what :meth:`_own` gave in the shape of the outputs."""
        return values if self.axis in (None, -1) else values.movedim(-1, self.axis or -1)


def _only(values: Tensor, flat: Tensor, rows: Rows) -> Tensor:
    """Zero the rows that do not count, in place; return all values."""
    if not isinstance(rows, AllRows):
        absent = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
        absent[rows.indices(flat.device)] = False
        flat.masked_fill_(absent[:, None], 0)
    return values


def _squeezed(shape: torch.Size) -> list[int]:
    return [n for n in shape if n != 1]


def sampled_gradient(logits: Tensor, rows: Rows, generator: torch.Generator) -> tuple[Tensor, int]:
    """Draw a label for every row that counts, from softmax(logits); return the gradient.

    Args:
        logits: [..., classes], any float dtype. Overwritten by the gradient where the backward
            needs its values no more.
        rows: Which of the flattened leading dimensions count.
        generator: Draws the labels; on the device of ``logits``.

    Returns:
        The gradient, of the shape and dtype of ``logits`` and zero in rows that do not count; and
        the number of labels.
    """
    return Likelihood(SOFTMAX, "", "").sampled(logits, rows, generator)


def label_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return the gradient of a softmax for given labels.

    Args:
        logits: [..., classes], any float dtype. Overwritten as by :func:`sampled_gradient`.
        labels: int64, the leading shape of ``logits``; -100 where there is none.

    Returns:
        The gradient, of the shape and dtype of ``logits`` and zero without a label; and the number
        of labels.

    Raises:
        InputError: If a label is no class.
    """
    values, targets = _own_values(logits), labels.flatten()
    flat = values.flatten(0, -2)  # [rows, classes]
    absent = targets == IGNORED_LABEL  # [rows]
    safe = targets.masked_fill(absent, 0)[:, None]  # [rows, 1]
    classes = flat.shape[1]
    wrong = (safe < 0) | (safe >= classes)
    # One wait for both, and before an index out of range could end the device's process.
    missing, invalid = torch.stack([absent.sum(), wrong.sum()]).tolist()
    if invalid:
        raise InputError(
            f"{invalid} label(s) are not among the {classes} classes: the model has another "
            f"vocabulary or number of classes, or what is to be ignored is not {IGNORED_LABEL}"
        )
    step = max(1, _CHUNK_VALUES // classes)
    for rows, own in zip(flat.split(step), safe.split(step), strict=True):
        rows.copy_(ops.minus_onehot_(rows.softmax(-1, dtype=torch.float32), own))
    flat.masked_fill_(absent[:, None], 0)
    return values, len(targets) - missing


def fisher_gradient(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random gradient whose second moment is that of p - onehot(y), y drawn from p.

    It is √p∘z - p (√p·z), z independent random signs, so E[ggᵀ] = diag(p) - ppᵀ: of a certain
    prediction nearly every label drawn gives a gradient near zero, while all signs give some.
    Source: Martens, Sutskever and Swersky, arXiv 1206.6464.

    Args:
        logits: [..., classes], any float dtype.
        targets: int64, the leading shape of ``logits``; where it is -100 the gradient is zero.
        generator: Draws the signs, on the CPU.

    Returns:
        The gradient of the summed loss, of the shape and dtype of ``logits``.
    """
    p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    signs = 2 * torch.randint(0, 2, p.shape, generator=generator, device="cpu") - 1  # z
    spread = p.sqrt() * signs.to(p)  # √p∘z: [..., classes]
    gradient = spread - p * spread.sum(-1, keepdim=True)
    return gradient.masked_fill_(targets.eq(IGNORED_LABEL)[..., None], 0).to(logits.dtype)


def _own_values(logits: Tensor) -> Tensor:
    """Return the values of logits, contiguous, to be written to: a copy where they are needed."""
    values = logits.detach()
    if type(logits.grad_fn).__name__ in _FORGETFUL and values.is_contiguous():
        return values
    return values.clone(memory_format=torch.contiguous_format)
