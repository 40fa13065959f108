"""A model whose weights are the same bits on every machine: numbers of few binary digits."""

from __future__ import annotations

import torch
from torch import nn


def saved_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            steps = torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter)
            parameter.copy_((steps * 7 % 11 - 5) / 8)
    return model
