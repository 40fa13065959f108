"""Planning: memory, passes and FLOPs of a collection, from a configuration alone."""

from curvfast.planning.collection_plan import CollectionPlan as CollectionPlan
from curvfast.planning.plan import plan_collection as plan_collection
