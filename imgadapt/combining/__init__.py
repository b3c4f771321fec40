"""Combining adapters: into one adapter, into a checkpoint; taking them out of checkpoints; shrinking them."""
