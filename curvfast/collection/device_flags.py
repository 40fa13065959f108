"""Whether rows on accelerators were finite: noted there, and read when sums are."""

from __future__ import annotations

import torch
from torch import Tensor

from curvfast.errors import NonFiniteError


class DeviceFlags:
    """Flags of calls whose values nobody waits for: the newest batch that was bad, by layer."""

    def __init__(self) -> None:
        """Start with none."""
        self._bad: dict[tuple[str, str], Tensor] = {}

    def note(self, layer: str, what: str, finite: Tensor, number: int) -> None:
        """Note whether a call was finite.

        Args:
            layer: Its layer.
            what: Which of its tensors: "input" or "gradient".
            finite: Bool, []; not waited for.
            number: The batch's, from 0 on.
        """
        bad = torch.where(finite, 0, number + 1)
        known = self._bad.get((layer, what))
        self._bad[layer, what] = bad if known is None else torch.maximum(known, bad)

    def absorb(self, other: DeviceFlags) -> None:
        """Take over the flags of sums that are added to those of these flags."""
        for key, bad in other._bad.items():
            known = self._bad.get(key)
            self._bad[key] = bad if known is None else torch.maximum(known, bad)

    def clear(self) -> None:
        """Forget every flag."""
        self._bad.clear()

    def bad(self) -> list[tuple[str, str, int]]:
        """Return (layer, which tensor, batch) of what was not finite; waits once a device."""
        devices: dict[torch.device, list[tuple[str, str]]] = {}
        for key, bad in self._bad.items():
            devices.setdefault(bad.device, []).append(key)
        found = []
        for keys in devices.values():
            numbers = torch.stack([self._bad[key] for key in keys]).tolist()
            found += [(*key, n - 1) for key, n in zip(keys, numbers, strict=True) if n]
        return found

    def require_finite(self) -> None:
        """Wait for the flags, once a device.

        Raises:
            NonFiniteError: If a call was not finite.
        """
        problems = [f"{layer!r}: its {what} in batch {n}" for layer, what, n in self.bad()]
        if problems:
            raise NonFiniteError(
                "a tensor held NaN or infinity where logits and loss were finite, and is in the "
                "sums: on an accelerator it is found when they are read, since to look before "
                "would wait for the device at every layer. Measure again from the last checkpoint "
                "before, leave the batch out, and under fp16 autocast pass grad_scaler=:\n  "
                + "\n  ".join(problems[:8])
            )
