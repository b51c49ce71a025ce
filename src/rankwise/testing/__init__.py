"""Contract suites that every member of a family passes; needs pytest. Subclass one to test your own model with it."""

from rankwise.testing.adapter_contract import AdapterContract

__all__ = ["AdapterContract"]
