"""Drawing: the loaded base, the adapters on it, and one call of it."""
