"""Checkpoints: a base's weights by layer, wherever they are; merges baked into them; adapters taken out of them."""
