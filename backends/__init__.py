"""Backends: one folder each, never importing one another. They see engine's protocol modules and nothing else of ours.

`mlx` and `cuda` are also the names of namespace packages outside: never put this folder itself on sys.path.
"""
