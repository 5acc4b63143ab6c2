"""Training: batches, objective, averaged weights, checkpoints and the loop around them."""
