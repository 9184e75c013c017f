"""Which plan the engine is under, and how a minibatch is cut.

A plan is made at set-up, before anything is known of batches and calls. It is made again when the module has changed, and
once when the first step has shown that layers are called in another order than they are registered.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torchmetrics import Metric

from harmony_lightning.config import HarmonyConfig
from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.plan import Plan, check_plan
from harmony_lightning.prepare import CallOrder, Workload, prepare
from harmony_lightning.runtime.engine import Engine
from harmony_lightning.runtime.minibatch import Microbatches, split_minibatch
from harmony_lightning.runtime.rows import num_samples
from harmony_lightning.scheduler import automatic_microbatch_size
from harmony_lightning.strategy.automatic import AutomaticPlan

log = logging.getLogger(__name__)


class Planning:
    """The plan of one run, from set-up to teardown.

    Attributes:
        metrics: `torchmetrics` objects of the module.
    """

    def __init__(
        self,
        engine: Engine,
        config: HarmonyConfig,
        given: Plan | None,
        state_nbytes: Mapping[str, tuple[int, ...]] | None = None,
        automatic: AutomaticPlan | None = None,
    ) -> None:
        """Makes and loads the first plan; `given` is the user's own, `automatic` finds a better one. `state_nbytes` has the
        bytes of each tensor that the optimizer will remember of a weight, by weight; None if devices are not to update any.

        Raises:
            ConfigurationError, CapacityError: no plan can be carried out.
        """
        self._engine = engine
        self._config = config
        self._given = given
        self._automatic = automatic if given is None else None
        self._is_searched = False
        self.searched: Plan | None = None
        """The plan that the search has found, while it is in use."""
        self._state_nbytes = state_nbytes
        self._has_traced = False
        self._call_order: CallOrder | None = None
        self._min_samples = 1
        self.metrics: list[Metric] = []
        self._load(Workload(microbatch_size=1, num_microbatches=1))

    def _load(self, workload: Workload) -> None:
        engine = self._engine
        decomposition, plan = prepare(
            engine.root, engine.cluster, self._config, workload, self._call_order, self._state_nbytes
        )
        if self._given is not None:
            plan = self._given
            check_plan(plan, decomposition, len(engine.cluster.devices))
        self.searched = None
        self._take_up(plan, decomposition)

    def _take_up(self, plan: Plan, decomposition: Decomposition) -> None:
        engine = self._engine
        engine.load(plan, decomposition)
        self.metrics = [inner for inner in engine.root.modules() if isinstance(inner, Metric)]
        self._min_samples = 2 if decomposition.has_batch_statistics else 1

    def search(self, batch: Any) -> bool:
        """Before the first minibatch: let the search find a plan, if it may; whether it has found one."""
        if self._automatic is None or self._is_searched:
            return False
        self._is_searched = True
        planned = self._automatic.find(batch, self._min_samples)
        if planned is None:
            return False
        self._take_up(planned.plan, planned.decomposition)
        self.searched = planned.plan
        return True

    @property
    def may_shrink(self) -> bool:
        """Whether a plan that does not fit may give way to a smaller one."""
        return self._automatic is not None and self.searched is not None and not self._automatic.has_shrunk

    def shrink(self, batch: Any) -> None:
        """Find a plan for less memory, from sizes alone if the search finds none."""
        assert self._automatic is not None
        self._automatic.shrink()
        self._is_searched = False
        if not self.search(batch):
            self._load(Workload(microbatch_size=1, num_microbatches=num_samples(batch) or 1))

    def split(self, batch: Any) -> Microbatches:
        """The minibatch in microbatches of the planned size, or in one piece with the reason."""
        size: int | str = self._config.microbatch_size
        plan = self._given or self.searched
        if size == "auto" and plan is not None:
            size = plan.microbatch_size
        if not isinstance(size, int):
            cluster = self._engine.cluster
            size = automatic_microbatch_size(
                num_samples(batch) or 1,
                len(cluster.devices),
                min_samples=self._min_samples,
                host_is_device=cluster.host_is_device,
            )
        return split_minibatch(batch, size, min_samples=self._min_samples, split=self._config.split_batch)

    def bring_up_to_date(self, parts: Microbatches) -> None:
        """Between steps: take up what has changed in the module, and what the first step has shown."""
        engine = self._engine
        workload = Workload(microbatch_size=max(parts.num_samples), num_microbatches=len(parts.batches))
        if engine.is_out_of_date():
            self._load(workload)
            self._is_searched = False  # again with the next minibatch
        if engine.trace.is_complete and not self._has_traced:
            self._has_traced = True
            order, loops = engine.trace.order(), engine.trace.loops()
            if self._given is None and not engine.plan.follows(order, loops):
                log.info("harmony: layers are called in another order than they are registered; planning again")
                self._call_order = CallOrder(layers=order, loops=loops)
                self._load(workload)
        if not engine.trace.is_complete:
            engine.resize(workload.microbatch_size, workload.num_microbatches)
