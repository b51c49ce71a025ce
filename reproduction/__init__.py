"""The documents' figures, made again: ``python -m reproduction icml24/fig5``."""
