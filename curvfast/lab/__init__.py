"""Small experiments on the effect of edits: images with wrong labels, tasks, passages."""
