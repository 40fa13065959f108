"""The four backends, and which operations each implements; "auto" prefers the first that can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curvfast.ops import (
    _native,
    blocked,
    energies,
    instructions,
    native_triangle,
    packed_rows,
    panels,
    projection,
    reference,
    reference_scores,
    sampling,
)
from curvfast.ops.launch import availability, group
from curvfast.ops.launch import energies as energies_kernel
from curvfast.ops.launch import moments as moments_kernel
from curvfast.ops.launch import projection as projection_kernel
from curvfast.ops.launch import sampling as sampling_kernel
from curvfast.ops.moments import one_by_one
from curvfast.ops.registry import Backend, register, unless_named

_copies: dict[str, Callable[..., Any]] = {
    "pack": panels.pack,
    "unpack": panels.unpack,
    "mirror_": panels.mirror_,
    "scale_": panels.scale_,
}
_definitions: dict[str, Callable[..., Any]] = {
    "second_moment_": reference.second_moment_,
    "second_moments_": one_by_one(reference.second_moment_),
    "project": reference.project,
    "band_energies": reference.band_energies,
    "pack": reference.pack,
    "unpack": reference.unpack,
    "mirror_": reference.mirror_,
    "scale_": reference.scale_,
}

register(
    Backend(
        "triton",
        {
            "second_moment_": moments_kernel.second_moment_,
            "second_moments_": group.second_moments_,
            "project": projection_kernel.project,
            "band_energies": energies_kernel.band_energies,
            "sampled_gradient_": sampling_kernel.sampled_gradient_,
            **_copies,
        },
        {
            "second_moment_": moments_kernel.refusal,
            "second_moments_": moments_kernel.refusal,
            "project": projection_kernel.refusal,
            "band_energies": energies_kernel.refusal,
            "sampled_gradient_": sampling_kernel.refusal,
            **dict.fromkeys(_copies, unless_named("triton", "copies are torch's")),
        },
        unavailable=availability.unavailable,
    )
)
register(
    Backend(
        "native",
        {
            "second_moment_": packed_rows.second_moment_,
            "second_moments_": one_by_one(packed_rows.second_moment_),
            "pack": native_triangle.pack,
            "unpack": native_triangle.unpack,
            "mirror_": native_triangle.mirror_,
            "scale_": native_triangle.scale_,
            "staircase_by_mass": _native.staircase_by_mass,
            "staircase_by_pairs": _native.staircase_by_pairs,
            "staircases_by_mass": _native.staircases_by_mass,
            "staircases_by_common_mass": _native.staircases_by_common_mass,
            "scores_by_mass": _native.scores_by_mass,
            "scores_by_pairs": _native.scores_by_pairs,
            "cheapest_split": _native.cheapest_split,
        },
        {
            "second_moment_": packed_rows.refusal,
            "second_moments_": packed_rows.refusal,
            "pack": native_triangle.refusal_unless_named,
            "unpack": native_triangle.refusal,
            "mirror_": native_triangle.refusal,
            "scale_": native_triangle.refusal_unless_named,
        },
        unavailable=instructions.unavailable,
        status=instructions.status,
    )
)
register(
    Backend(
        "torch",
        {
            "second_moment_": blocked.second_moment_,
            "second_moments_": one_by_one(blocked.second_moment_),
            "project": projection.banded,
            "band_energies": energies.by_columns,
            "sampled_gradient_": sampling.in_chunks,
            **_copies,
        },
        {
            "second_moment_": blocked.refusal,
            "second_moments_": blocked.refusal,
            "project": projection.refusal,
        },
    )
)
register(
    Backend(
        "reference",
        {
            **_definitions,
            "staircase_by_mass": reference.staircase_by_mass,
            "staircase_by_pairs": reference.staircase_by_pairs,
            "staircases_by_mass": reference.staircases_by_mass,
            "staircases_by_common_mass": reference.staircases_by_common_mass,
            "scores_by_mass": reference_scores.scores_by_mass,
            "scores_by_pairs": reference_scores.scores_by_pairs,
            "cheapest_split": reference.cheapest_split,
        },
        dict.fromkeys(_definitions, unless_named("reference", "it is written to be read")),
    )
)
