"""CurvatureCallback: logs the curvature spectrum of layers during a training by transformers."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from curvfast.collection.config import CollectConfig
from curvfast.collection.curvature import Curvature
from curvfast.errors import CurvfastError, InputError
from curvfast.kfac import spectrum_log
from curvfast.kfac.factors import Factors
from curvfast.kfac.spectrum import FRACTIONS
from curvfast.model.layers import LayerSpec, select
from curvfast.model.rows import RowRule

log = logging.getLogger(__name__)


class CurvatureCallback(TrainerCallback):  # type: ignore[misc]
    """A ``TrainerCallback`` that measures curvature at intervals and logs its spectrum.

    During the first ``steps`` of every ``every`` optimizer steps the Kronecker factors of the
    chosen layers are summed, from the very forwards and backwards that train, and a line is added
    to ``spectrum.jsonl``: a :class:`curvfast.kfac.spectrum_log.SpectrumRecord`. ``curvfast
    spectrum-log`` draws it. The training is the same as without, bit for bit; between those steps
    no hook is on the model, so evaluation does not count.

    G is of the *summed* loss: the Trainer's factors of the loss (gradient accumulation,
    ``num_items_in_batch``, ``average_tokens_across_devices``, AMP's scale) are read off the
    gradients. Labels are the data's own: these are factors of the empirical Fisher.

    What cannot be measured never ends a training. A refusal, before the first step, inside a step,
    or when figures are read, ends the measurement: nothing of it is written, its reason and the
    way out are logged once as a warning, ``refusal`` holds it and :attr:`factors` raises it. The
    next measurement is tried as usual.

    Only the first process measures, on its share of the rows. After an exception in a step the
    hooks stay until the model is called again or :meth:`close`; they count nothing.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        layers: LayerSpec = "mlp",
        *,
        every: int = 500,
        steps: int = 1,
        fractions: Sequence[float] = FRACTIONS,
        save_factors: bool = False,
        loss_scale: float | None = None,
        skip_last: bool | None = None,
        rows: RowRule | None = None,
        rows_per_step: float | None = None,
        sums_device: str = "same",
        seed: int = 0,
    ) -> None:
        """Check the arguments; nothing is measured before a training begins.

        Args:
            directory: Folder of the log. A new training appends a new run to an existing log; a
                resumed one continues the last run.
            layers: Which linear layers, as in :func:`curvfast.collect`.
            every: Optimizer steps from the beginning of one measurement to that of the next, the
                first beginning with step 0.
            steps: Optimizer steps of one measurement: enough for more rows than a layer is wide.
            fractions: Shares of all eigenpairs at which the mass curve is kept, in [0, 1].
            save_factors: Whether the factors are kept too, in ``factors-<step>``.
            loss_scale: None reads the unit of G off the gradients. Where that is refused, as it may
                be for a loss made outside the model (``compute_loss_func=``,
                ``label_smoothing_factor=``): the factor of that loss, taken as a mean over the
                ``num_items_in_batch`` that the model is called with, else over its labels; G is
                then of that loss.
            skip_last: Whether the last real position of each sequence is left out.
            rows: Row rule, as in :func:`curvfast.collect`.
            rows_per_step: Share or number of the rows of each batch that are counted.
            sums_device: Where sums live: ``"same"``, ``"cpu"`` or ``"disk"``.
            seed: Seed of the generator that draws ``rows_per_step``.

        Raises:
            InputError: If an argument is out of range.
        """
        if not 1 <= steps <= every:
            raise InputError(
                f"every={every}, steps={steps}: pass how many optimizer steps lie between two "
                "measurements, and how many each lasts, from 1 to that"
            )
        if not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
            raise InputError(f"fractions={fractions}: pass shares of the eigenpairs, in [0, 1]")
        told: dict[str, Any] = {} if loss_scale is None else {"loss_reduction": "mean"}
        self._config = CollectConfig(
            layers=layers if isinstance(layers, str) else repr(layers), loss_scale=loss_scale,
            skip_last=skip_last, rows_per_step=rows_per_step, sums_device=sums_device, seed=seed,
            **told,
        )  # fmt: skip
        self.directory = Path(directory)
        self._layers, self._rows = layers, rows
        self._every, self._steps = every, steps
        self._fractions = tuple(fractions)
        self._save_factors = save_factors
        self.refusal: CurvfastError | None = None
        """Why the last measurement ended without figures; None if it did not."""
        self._run = ""
        self._measurable = False
        self._logged: set[type[CurvfastError]] = set()
        self._saved: Path | None = None
        self._curvature: Curvature | None = None
        self._guard: RemovableHandle | None = None
        self._began = self._taken = 0

    @property
    def factors(self) -> Factors:
        """The factors of the last measurement, read from the disk at each use.

        Raises:
            CurvfastError: What was refused, if that ended the last measurement.
            InputError: If none is kept: ``save_factors`` is False, or none was made yet.
            StorageError: If they cannot be read.
        """
        if self.refusal is not None:
            raise self.refusal
        if self._saved is None:
            raise InputError(
                "no factors are kept: pass save_factors=True, and read them after a measurement"
            )
        return Factors.from_pretrained(self._saved)

    def close(self) -> None:
        """Remove every hook; the sums since the last record are discarded."""
        self._pause()
        self._curvature = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Log why a training cannot be measured, if it cannot, before the first step.

        It cannot if the model is compiled or replicated by threads, ``layers`` matches nothing, or
        the log's file cannot be read.
        """
        self.close()
        self.refusal, self._saved, self._measurable = None, None, False
        self._logged.clear()
        try:
            _refuse(args, model)
            select(model, self._layers)
            earlier = spectrum_log.read_log(self.directory) if state.global_step else []
        except CurvfastError as error:
            self._note("this training is not measured", error)
            return
        self._run = earlier[-1].run if earlier else secrets.token_hex(4)
        self._measurable = True

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Begin a measurement if one is due, or continue one."""
        self._pause()
        due = state.is_world_process_zero and state.global_step % self._every == 0
        if self._curvature is not None:
            self._curvature.resume()
        elif due and self._measurable:
            self._began, self._taken, self.refusal = state.global_step, 0, None
            scaler = getattr(kwargs.get("optimizer"), "scaler", None)
            try:
                self._curvature = self._begin(model, scaler)
            except CurvfastError as error:
                self._refused(error)
                return
        else:
            return
        loop = _caller()

        def leave_if_stopped(module: nn.Module, inputs: Any) -> None:
            if not _runs(loop):
                self.close()

        # Registered last: hooks before it must not be removed until they have run.
        self._guard = model.register_forward_pre_hook(leave_if_stopped)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a measurement if it lasted long enough, or something was refused."""
        if self._curvature is None:
            return
        self._pause()
        if self.refusal is not None:
            self.close()
            return
        # A step that GradScaler skips has overflowed: it added no or few rows.
        self._taken += not getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        if self._taken == self._steps:
            self._end(args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a measurement that is cut short by the end of the training."""
        if self._curvature is not None and self._taken and self.refusal is None:
            self._end(args)
        self.close()

    def _begin(self, model: nn.Module, scaler: torch.amp.GradScaler | None) -> Curvature:
        # Each measurement draws different rows, the same ones when a training is resumed.
        config = replace(self._config, seed=self._config.seed + self._began)
        facts = {"labels": "Trainer's loss", "step": self._began}
        return Curvature(
            model, config, self._layers, rows=self._rows, grad_scaler=scaler, facts=facts,
            on_error=self._refused,
        )  # fmt: skip

    def _pause(self) -> None:
        if self._curvature is not None:
            self._curvature.pause()
        if self._guard is not None:
            self._guard.remove()
        self._guard = None

    def _end(self, args: Any) -> None:
        curvature, step = self._curvature, self._began
        assert curvature is not None
        self.close()
        curvature.close()
        try:
            factors = curvature.factors()
            record = spectrum_log.measure(
                factors, run=self._run, step=step, steps=self._taken, loss=curvature.mean_loss(),
                fractions=self._fractions, processes=args.world_size,
            )  # fmt: skip
            if self._save_factors:
                factors.save_pretrained(self.directory / f"factors-{step}")
                self._saved = self.directory / f"factors-{step}"
            spectrum_log.append(self.directory, record)
        except CurvfastError as error:
            self._refused(error)

    def _refused(self, error: CurvfastError) -> None:
        """End the measurement by a refusal; its hooks do nothing more."""
        self._note(f"the curvature at step {self._began} is not in {str(self.directory)!r}", error)

    def _note(self, what: str, error: CurvfastError) -> None:
        # Logged, not warned: a filter that turns warnings into errors would end the training.
        if type(error) not in self._logged:
            log.warning("%s; the training goes on: %s", what, error)
        self._logged.add(type(error))
        # A traceback would hold the activations of the step.
        self.refusal = error.with_traceback(None)


def _refuse(args: Any, model: nn.Module) -> None:
    """Raise for trainings that bypass hooks."""
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    compiled = [name for name, m in model.named_modules() if m._compiled_call_impl is not None]
    if args.torch_compile or dynamo != "no" or compiled or hasattr(model, "_orig_mod"):
        raise InputError(
            "the model is compiled by torch.compile, which ignores hooks that are registered "
            "later; a CurvatureCallback's come and go, so it would see nothing. Leave "
            "torch_compile off, or measure checkpoints, uncompiled, with curvfast.collect_from()"
        )
    if args.n_gpu > 1:
        raise InputError(
            f"the Trainer spreads the model over {args.n_gpu} GPUs by torch.nn.DataParallel, whose "
            "replicas carry no name; launch one process for each GPU by torchrun, or make one "
            "visible by CUDA_VISIBLE_DEVICES"
        )


def _caller() -> FrameType:
    """Return the frame of the training loop, which called transformers' callback handler."""
    frame = sys._getframe(1)
    inside = (__name__, "transformers.trainer_callback")
    while frame.f_globals.get("__name__") in inside and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _runs(loop: FrameType) -> bool:
    """Return whether the current call is made by ``loop``, not after it was left."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not loop:
        frame = frame.f_back
    return frame is not None
