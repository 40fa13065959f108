"""The operations the rest of the library may call, each on the best backend at hand."""

from curvfast.ops import _triton, blocked, reference, registry
from curvfast.ops.moments import new_sum as new_sum
from curvfast.ops.moments import second_moment_ as second_moment_
from curvfast.ops.moments import sum_bytes as sum_bytes
from curvfast.ops.registry import backends as backends
from curvfast.ops.registry import use_backend as use_backend
from curvfast.ops.staircase import native_status as native_status
from curvfast.ops.staircase import staircase_by_mass as staircase_by_mass
from curvfast.ops.staircase import staircase_by_pairs as staircase_by_pairs
from curvfast.ops.triangular import TriangularSum as TriangularSum
from curvfast.ops.triangular import pack as pack

registry.register(
    registry.Backend(
        "triton",
        {"second_moment_": _triton.second_moment_},
        {"second_moment_": _triton.refusal},
        unavailable=_triton.unavailable,
        automatic=lambda: not _triton.interpreting(),
    )
)
registry.register(
    registry.Backend(
        "torch",
        {"second_moment_": blocked.second_moment_},
        {"second_moment_": blocked.refusal},
    )
)
registry.register(
    registry.Backend(
        "reference",
        {"second_moment_": reference.second_moment_},
        {"second_moment_": lambda call: None},
        automatic=lambda: False,
    )
)
