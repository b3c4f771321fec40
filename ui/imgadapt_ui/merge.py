"""The Merge tab."""

import gradio as gr
from imgadapt_ui.parts import Shared


def build(shared: Shared) -> None:
    """Fill the tab; called inside of it, when the other tabs' shared components are there."""
    gr.Markdown("...")
