"""Who: the owner of what a handler's request asks for."""

import gradio as gr

from imgadapt.playground.serving.sessions import owner_of


def owner(request: gr.Request) -> str:
    """`user-NAME` or `guest-...`, which the guard has found out; never Gradio's session_hash, which clients choose."""
    return owner_of(request.headers)
