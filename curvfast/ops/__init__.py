"""The operations the rest of the library may call, each on the best backend at hand."""

from curvfast.ops.moments import mirror_ as mirror_
from curvfast.ops.moments import second_moment_ as second_moment_
from curvfast.ops.staircase import native_status as native_status
from curvfast.ops.staircase import staircase_by_mass as staircase_by_mass
from curvfast.ops.staircase import staircase_by_pairs as staircase_by_pairs
