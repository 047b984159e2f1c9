"""What every process of the fleet shares. Importing the package costs nothing: the bootstrap relies on it."""

__version__ = "0.1.0"
