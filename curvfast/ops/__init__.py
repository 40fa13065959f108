"""The operations the rest of the library may call, each on the best backend at hand."""

from collections.abc import Callable as _Callable

from curvfast.ops import _library as _library
from curvfast.ops import (
    blocked,
    energies,
    instructions,
    native_triangle,
    packed_rows,
    panels,
    projection,
    reference,
    registry,
    sampling,
)
from curvfast.ops.corrections import add_by_position_ as add_by_position_
from curvfast.ops.corrections import add_by_sequence_ as add_by_sequence_
from curvfast.ops.corrections import project_rows as project_rows
from curvfast.ops.energies import band_energies as band_energies
from curvfast.ops.launch import availability as _availability
from curvfast.ops.launch import energies as _energies
from curvfast.ops.launch import group as _group
from curvfast.ops.launch import moments as _moments
from curvfast.ops.launch import projection as _projection
from curvfast.ops.launch import sampling as _sampling
from curvfast.ops.moments import new_sum as new_sum
from curvfast.ops.moments import one_by_one
from curvfast.ops.moments import second_moment_ as second_moment_
from curvfast.ops.moments import second_moments_ as second_moments_
from curvfast.ops.moments import sum_bytes as sum_bytes
from curvfast.ops.moments import tile_width as tile_width
from curvfast.ops.plan import Plan as Plan
from curvfast.ops.plan import plan as plan
from curvfast.ops.projection import project as project
from curvfast.ops.registry import backends as backends
from curvfast.ops.registry import use_backend as use_backend
from curvfast.ops.request import MomentRequest as MomentRequest
from curvfast.ops.sampling import minus_onehot_ as minus_onehot_
from curvfast.ops.sampling import sampled_gradient_ as sampled_gradient_
from curvfast.ops.scores import scores_by_mass as scores_by_mass
from curvfast.ops.scores import scores_by_pairs as scores_by_pairs
from curvfast.ops.staircase import native_status as native_status
from curvfast.ops.staircase import staircase_by_mass as staircase_by_mass
from curvfast.ops.staircase import staircase_by_pairs as staircase_by_pairs
from curvfast.ops.staircase import staircases_by_common_mass as staircases_by_common_mass
from curvfast.ops.staircase import staircases_by_mass as staircases_by_mass
from curvfast.ops.triangular import TriangularSum as TriangularSum
from curvfast.ops.triangular import mirror_ as mirror_
from curvfast.ops.triangular import pack as pack

_copies: dict[str, _Callable[..., None]] = {
    "pack": panels.pack,
    "unpack": panels.unpack,
    "mirror_": panels.mirror_,
    "scale_": panels.scale_,
}

registry.register(
    registry.Backend(
        "triton",
        {
            "second_moment_": _moments.second_moment_,
            "second_moments_": _group.second_moments_,
            "project": _projection.project,
            "band_energies": _energies.band_energies,
            "sampled_gradient_": _sampling.sampled_gradient_,
            **_copies,
        },
        {
            "second_moment_": _moments.refusal,
            "second_moments_": _moments.refusal,
            "project": _projection.refusal,
            "band_energies": _energies.refusal,
            "sampled_gradient_": _sampling.refusal,
            **dict.fromkeys(_copies, registry.unless_named("triton", "copies are torch's")),
        },
        unavailable=_availability.unavailable,
        # The interpreter runs kernels where asked for by name, never on its own account.
        automatic=lambda: not _availability.interpreting(),
    )
)
registry.register(
    registry.Backend(
        "native",
        {
            "second_moment_": packed_rows.second_moment_,
            "second_moments_": one_by_one(packed_rows.second_moment_),
            "pack": native_triangle.pack,
            "unpack": native_triangle.unpack,
            "mirror_": native_triangle.mirror_,
            "scale_": native_triangle.scale_,
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
registry.register(
    registry.Backend(
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
            "band_energies": energies.refusal,
            "sampled_gradient_": sampling.refusal,
            **dict.fromkeys(_copies, lambda *_: None),
        },
    )
)
registry.register(
    registry.Backend(
        "reference",
        {
            "second_moment_": reference.second_moment_,
            "second_moments_": one_by_one(reference.second_moment_),
            "project": reference.project,
            "band_energies": reference.band_energies,
            "pack": reference.pack,
            "unpack": reference.unpack,
            "mirror_": reference.mirror_,
            "scale_": reference.scale_,
        },
        dict.fromkeys(
            ("second_moment_", "second_moments_", "project", "band_energies", *_copies),
            lambda *_: None,
        ),
        automatic=lambda: False,
    )
)
