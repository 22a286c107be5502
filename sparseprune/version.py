"""The version of the package, in pyproject.toml too."""

__version__ = "0.1.0"
