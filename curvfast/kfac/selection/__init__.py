"""Selection of eigenpairs: staircases, masks, and the searches for both."""
