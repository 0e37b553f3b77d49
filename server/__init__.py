"""The OpenAI server: a Quart ASGI app over engine's public API."""
