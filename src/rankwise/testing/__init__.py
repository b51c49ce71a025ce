"""Contract suites that every member of a family passes; needs pytest. Subclass one to test your own model with it."""

from rankwise.testing.adapter_contract import AdapterContract
from rankwise.testing.optimizer_contract import OptimizerContract

__all__ = ["AdapterContract", "OptimizerContract"]
