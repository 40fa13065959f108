"""Collection of Kronecker factors and EK-FAC corrections in a training loop or from data."""

from curvfast.collection.collect import collect as collect
