"""Merges: looking at what a stack would be as one file, and making it."""
