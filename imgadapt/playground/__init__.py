"""The playground without its face: adapters, pictures, grids, merges and trainings behind one queue.

`ui/` shows it, its API calls it, programs use it; nothing here knows Gradio.
"""
