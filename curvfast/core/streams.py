"""A CUDA stream of one's own: workers that wait for their input, and not for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def side_stream(device: torch.device | None) -> Iterator[None]:
    """Run the block on a new stream, begun after what is queued now and finished when it ends.

    Args:
        device: Of the block's tensors; anything but a CUDA device changes nothing.

    Yields:
        Nothing.
    """
    if device is None or device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
