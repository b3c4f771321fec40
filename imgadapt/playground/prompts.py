"""Prompts: the `<lora:name:weight>` tags in them."""
