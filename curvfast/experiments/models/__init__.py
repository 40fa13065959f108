"""Small models of the experiments, trained here and kept in a cache."""
