"""Collection of Kronecker factors and EK-FAC corrections in a training loop or from data."""
