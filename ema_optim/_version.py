"""The package's version, for those that write it into files."""

__version__ = "0.1.0"
