"""Lightning strategies; importing this package registers `moe_parallel`."""

from lightning.pytorch.strategies import StrategyRegistry

from lit_interns1.strategies.moe_parallel import MoEParallelStrategy
from lit_interns1.strategies.parallel_dims import ParallelDims

__all__ = ["MoEParallelStrategy", "ParallelDims"]

if "moe_parallel" not in StrategyRegistry:
    StrategyRegistry.register("moe_parallel", MoEParallelStrategy, "FSDP2 together with expert parallelism")
