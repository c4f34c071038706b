"""The version of the installed package: the one in `pyproject.toml`, which a test compares.

A constant, because `importlib.metadata` costs more to import than the whole of `import octoai`.
"""

__version__ = "1.12.0"
