"""Rillet's public API."""
