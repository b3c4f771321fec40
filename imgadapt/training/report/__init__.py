"""The report of a training: one page of what was learnt, and the figures behind it."""
