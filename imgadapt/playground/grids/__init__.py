"""Grids: pictures over axes; and which blocks of an adapter act."""
