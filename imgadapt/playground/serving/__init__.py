"""Serving: who may ask what, and what is given out by id."""
