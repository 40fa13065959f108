"""Progress bars: the only module that imports tqdm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Bar:
    """A progress bar, shown on a terminal only, unless it is disabled."""

    def __init__(self, title: str, total: float | None, unit: str, enabled: bool = True) -> None:
        """Start a progress bar; with ``total`` None it is a plain counter."""
        from tqdm.auto import tqdm

        # disable=None hides the bar where stderr is not a terminal, so logs stay clean.
        off = None if enabled else True
        self._bar = tqdm(total=total, desc=title, unit=unit, disable=off, leave=False)

    def advance(self, amount: float, **figures: object) -> None:
        """Advance by ``amount`` and show ``figures`` beside the bar."""
        if figures:
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(amount)

    def close(self) -> None:
        """Close the bar and clear it from the terminal."""
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
