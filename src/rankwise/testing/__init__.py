"""Contract suites that every member of a family passes; needs pytest and hypothesis. Subclass one to test your own with it."""

from rankwise.testing.adapter_contract import AdapterContract
from rankwise.testing.optimizer_contract import OptimizerContract
from rankwise.testing.projected_contract import ProjectedContract

__all__ = ["AdapterContract", "OptimizerContract", "ProjectedContract"]
