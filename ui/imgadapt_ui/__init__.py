"""The playground's face: a Gradio page and an HTTP API over `imgadapt.playground`."""
