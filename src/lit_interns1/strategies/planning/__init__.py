"""Planning: memory, communication and bounds of a run on N ranks, without any of them."""

from lit_interns1.strategies.planning.hardware import HARDWARE, Hardware, load_hardware
from lit_interns1.strategies.planning.plan import Plan, Workload, make_plan

__all__ = ["HARDWARE", "Hardware", "Plan", "Workload", "load_hardware", "make_plan"]
