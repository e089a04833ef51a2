"""The user's data: batches, the random numbers they draw, and what flows through a layer."""
