"""A separate CUDA stream for each worker, ordered after its input only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def side_stream(device: torch.device | None) -> Iterator[None]:
    """Run the block on a new stream, ordered after the work queued now; synchronised at its end.

    Args:
        device: Device of the block's tensors; on any other than a CUDA device nothing changes.

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
