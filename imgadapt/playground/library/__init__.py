"""The library: adapters and bases on disk, known by ids."""
