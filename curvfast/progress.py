"""Progress bars: the one place that knows tqdm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Bar:
    """A counter shown on a terminal; silent elsewhere and when switched off."""

    def __init__(self, title: str, total: float | None, unit: str, enabled: bool = True) -> None:
        """Start a bar; ``total`` None shows a plain counter."""
        from tqdm.auto import tqdm

        # disable=None hides the bar where stderr is not a terminal, so logs stay clean.
        off = None if enabled else True
        self._bar = tqdm(total=total, desc=title, unit=unit, disable=off, leave=False)

    def advance(self, amount: float, **figures: object) -> None:
        """Move on by ``amount`` and show ``figures`` beside the bar."""
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
