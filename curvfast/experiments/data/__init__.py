"""Data of the experiments: prose, pictures, and tasks made from nothing."""
