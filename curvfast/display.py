"""Display: progress bars and text tables; the only module that imports tqdm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
ReportStage = Callable[[str], None]
"""Called with one line of text at each stage of a long run."""


def silent(line: str) -> None:
    """Report nothing."""


def tenth_ends(done: float, total: float, amount: float = 1) -> bool:
    """Return whether the last ``amount`` of ``done`` ended a tenth of ``total``."""
    return 10 * done // total > 10 * (done - amount) // total


class Bar:
    """A counter shown on a terminal; elsewhere a line each tenth; nothing when switched off."""

    def __init__(
        self,
        title: str,
        total: float | None,
        unit: str,
        enabled: bool = True,
        *,
        done: float = 0,
        report_stage: ReportStage = silent,
    ) -> None:
        """Start a bar.

        Args:
            title: What is being done.
            total: How much there is to do; None shows a plain counter.
            unit: What is counted, in the singular.
            enabled: False shows and reports nothing.
            done: What was done before.
            report_stage: Called at the end of each tenth where no bar is shown.
        """
        from tqdm.auto import tqdm

        # disable=None hides the bar where stderr is not a terminal, so logs stay clean.
        off = None if enabled else True
        self._bar = tqdm(total=total, desc=title, unit=unit, disable=off, leave=False, initial=done)
        self._title, self._total, self._unit, self._done = title, total, unit, done
        self._report_stage = report_stage if enabled and self._bar.disable else silent

    def advance(self, amount: float, **figures: object) -> None:
        """Move on by ``amount`` and show ``figures`` beside the bar."""
        self._done += amount
        if self._total and tenth_ends(self._done, self._total, amount):
            beside = "".join(f", {name} {figure}" for name, figure in figures.items())
            self._report_stage(
                f"{self._title}: {self._done} of {self._total} {self._unit}s "
                f"({self._done / self._total:.0%}){beside}"
            )
        if figures:
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(amount)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def __enter__(self) -> Bar:
        """Return the bar."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        self.close()


def track(
    items: Iterable[T], title: str, total: int, unit: str, enabled: bool = True
) -> Iterator[T]:
    """Yield ``items`` while a bar counts them."""
    with Bar(title, total, unit, enabled) as bar:
        for item in items:
            yield item
            bar.advance(1)


def aligned(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return cells as columns, the first ``left`` of them left-justified, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
