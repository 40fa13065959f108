"""The four backends, and which operations each implements; "auto" prefers the first that can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curvfast.ops import (
    blocked_second_moment,
    energies,
    finite,
    packed_layout,
    projection,
    reference,
    sampling,
)
from curvfast.ops.launch import availability, group
from curvfast.ops.launch import energies as energies_kernel
from curvfast.ops.launch import moments as moments_kernel
from curvfast.ops.launch import projection as projection_kernel
from curvfast.ops.launch import sampling as sampling_kernel
from curvfast.ops.native import extension, instructions, packed_symmetric, second_moment
from curvfast.ops.native import finite as finite_rows
from curvfast.ops.registry import Backend, register, unless_named
from curvfast.ops.second_moment import one_by_one

_copies: dict[str, Callable[..., Any]] = {
    "pack": packed_layout.pack,
    "unpack": packed_layout.unpack,
    "mirror_": packed_layout.mirror_,
    "scale_": packed_layout.scale_,
}
_definitions: dict[str, Callable[..., Any]] = {
    "second_moment_": reference.second_moment_,
    "second_moments_": one_by_one(reference.second_moment_),
    "second_moment_if_finite_": finite.looked_at_first(reference.second_moment_),
    "all_finite": reference.all_finite,
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
            "second_moment_if_finite_": finite.looked_at_first(moments_kernel.second_moment_),
            "all_finite": finite.by_extremes,
            "project": projection_kernel.project,
            "band_energies": energies_kernel.band_energies,
            "sampled_gradient_": sampling_kernel.sampled_gradient_,
            **_copies,
        },
        {
            "second_moment_": moments_kernel.refusal,
            "second_moments_": moments_kernel.refusal,
            "second_moment_if_finite_": moments_kernel.refusal,
            "all_finite": unless_named("triton", "extremes are torch's"),
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
            "second_moment_": second_moment.second_moment_,
            "second_moments_": one_by_one(second_moment.second_moment_),
            "second_moment_if_finite_": second_moment.second_moment_if_finite_,
            "all_finite": finite_rows.all_finite,
            "pack": packed_symmetric.pack,
            "unpack": packed_symmetric.unpack,
            "mirror_": packed_symmetric.mirror_,
            "scale_": packed_symmetric.scale_,
            "staircase_by_mass": extension.staircase_by_mass,
            "staircase_by_pairs": extension.staircase_by_pairs,
            "staircases_by_mass": extension.staircases_by_mass,
            "staircases_by_common_mass": extension.staircases_by_common_mass,
            "scores_by_mass": extension.scores_by_mass,
            "scores_by_pairs": extension.scores_by_pairs,
            "cheapest_split": extension.cheapest_split,
        },
        {
            "second_moment_": second_moment.refusal,
            "second_moments_": second_moment.refusal,
            "second_moment_if_finite_": second_moment.refusal,
            "all_finite": finite_rows.refusal,
            "pack": packed_symmetric.refusal_unless_named,
            "unpack": packed_symmetric.refusal,
            "mirror_": packed_symmetric.refusal,
            "scale_": packed_symmetric.refusal_unless_named,
        },
        unavailable=extension.unavailable,
        status=instructions.status,
        variables=(instructions.ENVIRONMENT,),
    )
)
register(
    Backend(
        "torch",
        {
            "second_moment_": blocked_second_moment.second_moment_,
            "second_moments_": one_by_one(blocked_second_moment.second_moment_),
            "second_moment_if_finite_": finite.looked_at_first(
                blocked_second_moment.second_moment_
            ),
            "all_finite": finite.by_extremes,
            "project": projection.banded,
            "band_energies": energies.by_columns,
            "sampled_gradient_": sampling.in_chunks,
            **_copies,
        },
        {
            "second_moment_": blocked_second_moment.refusal,
            "second_moments_": blocked_second_moment.refusal,
            "second_moment_if_finite_": blocked_second_moment.refusal,
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
            "scores_by_mass": reference.scores_by_mass,
            "scores_by_pairs": reference.scores_by_pairs,
            "cheapest_split": reference.cheapest_split,
        },
        dict.fromkeys(_definitions, unless_named("reference", "it is written to be read")),
    )
)
