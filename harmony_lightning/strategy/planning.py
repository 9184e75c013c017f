"""Which plan the engine is under, and how a minibatch is cut.

A plan is made at set-up, before anything is known of batches and calls. It is made again when the module has changed, and
when steps have shown more: that layers are called in another order than they are registered, and of which weights they use
nothing but what autocast casts them to.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torchmetrics import Metric

from harmony_lightning.config import HarmonyConfig
from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.errors import CapacityError
from harmony_lightning.plan import Plan, order_fault
from harmony_lightning.prepare import CallOrder, Narrow, Workload, prepare, prepare_given, tell
from harmony_lightning.runtime.batch.minibatch import Microbatches, split_minibatch
from harmony_lightning.runtime.batch.rows import num_samples
from harmony_lightning.runtime.engine import Engine
from harmony_lightning.scheduler import automatic_microbatch_size
from harmony_lightning.strategy.automatic import AutomaticPlan, Request
from harmony_lightning.strategy.residency import Residency
from harmony_lightning.units import format_nbytes

log = logging.getLogger(__name__)

SMALLER_SHARE = 0.8
"""Of the memory planned with so far, when memory turned out to be short."""
_LEAST_SHARE = 1e-3


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
        state_nbytes: Callable[[], Mapping[str, tuple[int, ...]] | None] = lambda: None,
        automatic: AutomaticPlan | None = None,
    ) -> None:
        """Makes and loads the first plan; `given` is the user's own, `automatic` finds a better one. `state_nbytes` tells
        the bytes of each tensor that the optimizer will remember of a weight, by weight; None if devices are not to update
        any.

        Raises:
            ConfigurationError, CapacityError: no plan can be carried out.
        """
        self._engine = engine
        self._config = config
        self._given = given
        self._automatic = automatic if given is None else None
        self._is_searched = False
        """Whether the search has had its turn since the module has changed."""
        self.searched: Plan | None = None
        """The plan that the search has found, while it is in use."""
        self._state_nbytes = state_nbytes
        self._share = 1.0
        """Of the memory, what plans are made for."""
        self._has_failed = False
        """Whether a forward has run out of memory, whatever gave way."""
        self._was_short = False
        """Whether memory was short in a step, which went on as something gave way."""
        self._has_shrunk_behind = False
        """Whether a plan for less memory was made behind such a step."""
        self._has_traced = False
        self._call_order: CallOrder | None = None
        self._narrow = Narrow()
        self._min_samples = 1
        self.metrics: list[Metric] = []
        self._residency: Residency | None = None
        self._loaded: tuple[Decomposition, Plan]
        """What the engine was given last; residency may have changed the plan since."""
        self._load(Workload(microbatch_size=1, num_microbatches=1))

    def _prepare(self, workload: Workload, former: Plan | None = None) -> tuple[Decomposition, Plan]:
        """For the share of the memory, or else the least share that there is a plan for, with no more for what may stay;
        with the placement of a `former` one."""
        share = self._share
        while True:
            try:
                decomposition, plan = self._prepare_for(share, workload, former)
            except CapacityError:
                if share == 1:
                    raise
                share = min(1.0, share / SMALLER_SHARE)
            else:
                return decomposition, replace(plan, memory_bytes=int(self._share / share * plan.memory_bytes))

    def _prepare_for(self, share: float, workload: Workload, former: Plan | None = None) -> tuple[Decomposition, Plan]:
        engine, config = self._engine, self._config
        engine.settle()  # it looks at the optimizer's states
        if former is not None:
            config = replace(config, mode="mixed" if former.dealt else former.mode, pipelines=former.pipelines)
        states = self._state_nbytes() if config.update in ("device", "first") else None
        return prepare(
            engine.root, engine.cluster, config, workload, self._call_order, self._narrow, states, share=share
        )

    def _load(self, workload: Workload, *, is_under_way: bool = False) -> None:
        self.searched = None
        if self._given is not None:
            root, cluster = self._engine.root, self._engine.cluster
            decomposition, plan = prepare_given(root, cluster, self._given, is_under_way=is_under_way)
            self._given = plan
        else:
            decomposition, plan = self._prepare(workload)
            tell(plan)
        self._take_up(plan, decomposition)

    def _take_up(self, plan: Plan, decomposition: Decomposition) -> None:
        engine = self._engine
        engine.load(plan, decomposition)
        self._loaded = decomposition, plan
        is_complete = self._given is not None or engine.cluster.host_is_device
        self._residency = None if is_complete else Residency(engine, moves_stash=self._config.stash == "host")
        self.metrics = [inner for inner in engine.root.modules() if isinstance(inner, Metric)]
        self._min_samples = 2 if decomposition.has_batch_statistics else 1

    def search(self, batch: Any, *arguments: Any) -> None:
        """Before the first minibatch: where the search chooses microbatches, let it. `arguments` follow the batch in
        `training_step`."""
        if self._automatic is None or not self._automatic.chooses_all or self._is_searched:
            return
        self._is_searched = True
        request = self._request(*self._loaded, self.split(batch), keeps_microbatches=self._keeps_numbers)
        planned = self._automatic.find(request, batch, arguments)
        if planned is not None:
            self.searched = planned.plan
            self._take_up(planned.plan, planned.decomposition)

    @property
    def _keeps_numbers(self) -> bool:
        """Statistics depend on a microbatch's size, and what is to be repeatable must not depend on how fast GPUs are."""
        return self._loaded[0].has_batch_statistics or torch.are_deterministic_algorithms_enabled()

    def _request(
        self, decomposition: Decomposition, plan: Plan, parts: Microbatches, *, keeps_microbatches: bool
    ) -> Request:
        return Request(
            samples=sum(parts.num_samples) if parts.reason is None else 0,
            min_samples=self._min_samples,
            decomposition=decomposition,
            in_use=_for_workload(plan, _workload(parts)),
            keeps_microbatches=keeps_microbatches,
            keeps_places=self._keeps_numbers or self._automatic is None or not self._automatic.chooses_all,
        )

    def _search_again(self, batch: Any, arguments: tuple[Any, ...], parts: Microbatches, *, has_learned: bool) -> None:
        """Behind the first step, when everything is known: let the search improve on the plan made from sizes, with the
        same microbatches; or on its own, if that knew less."""
        automatic, former = self._automatic, self.searched
        decomposition, plan = self._loaded
        if has_learned:
            decomposition, plan = self._prepare(_workload(parts), former)
        planned = None
        if automatic is not None and (automatic.chooses_all or not self._has_failed):
            keeps_microbatches = self._keeps_numbers or former is None or not has_learned
            request = self._request(decomposition, plan, parts, keeps_microbatches=keeps_microbatches)
            plan, planned = request.in_use, automatic.find(request, batch, arguments)
        if planned is not None and (planned.plan is not plan or former is not None):
            self.searched = planned.plan
            self._take_up(planned.plan, planned.decomposition)
        elif has_learned and former is None:
            tell(plan)
            self._take_up(plan, decomposition)

    def stop_searching(self) -> None:
        """Microbatches cannot be cut at packs, so the simulator knows nothing of their steps."""
        self._automatic = None

    @property
    def may_shrink(self) -> bool:
        """Whether a plan that does not fit may give way to another: for less memory, and if that does not fit either, to
        that whose packs take least."""
        if self._given is not None or self._engine.cluster.host_is_device:
            return False
        return not self._has_failed or self._smallest_share() is not None

    def _smallest_share(self) -> float | None:
        """Of the memory: that for which packs take least; None if they take no less than in the present plan."""
        plan, share = self._loaded[1], self._share
        workload = Workload(microbatch_size=plan.microbatch_size, num_microbatches=plan.num_microbatches)
        least, found = plan.arena_nbytes(), None
        with contextlib.suppress(CapacityError):
            while share > _LEAST_SHARE:  # a module without weights has a plan for any
                share *= SMALLER_SHARE
                if (nbytes := self._prepare_for(share, workload)[1].arena_nbytes()) < least:
                    least, found = nbytes, share
        return found

    def shrink(self, batch: Any, *arguments: Any) -> None:
        """Find a plan for less memory; from sizes alone if the search finds none, or has chosen nothing but packs."""
        former = self._loaded[1]
        self._share = (self._smallest_share() if self._has_failed else None) or SMALLER_SHARE * self._share
        self._has_failed = True
        self._is_searched = False
        self.searched = None
        self._load(_workload(self.split(batch)))
        self.search(batch, *arguments)
        log.warning("harmony: %s", self._outcome(former))

    def _outcome(self, former: Plan) -> str:
        """What has come of planning again."""
        plan = self._loaded[1]
        if plan is former:
            return "the plan stays, as no other was found"
        budget = ""
        if plan.memory_bytes != former.memory_bytes:
            budget = f" with {format_nbytes(plan.memory_bytes)} per GPU, not {format_nbytes(former.memory_bytes)}"
        return f"planned again{budget}{', in the same packs' if plan.packs == former.packs else ''}"

    def split(self, batch: Any) -> Microbatches:
        """The minibatch in microbatches of the planned size, or in one piece with the reason."""
        size: int | str = self._config.microbatch_size
        chooses = self._automatic is not None and self._automatic.chooses_all
        plan = self.searched if chooses else self._given
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

    def bring_up_to_date(self, batch: Any, parts: Microbatches, *arguments: Any) -> Microbatches:
        """Between steps: take up what has changed in the module, and what the first step has shown. Returns microbatches
        of the batch, which may be cut otherwise then."""
        engine = self._engine
        workload = _workload(parts)
        self._notice_shortage()
        if engine.is_out_of_date():
            self._load(workload, is_under_way=True)
            self._is_searched = False  # again with the next minibatch
        if engine.trace.is_complete and self._given is None:
            share, former, learned = self._share, self._loaded[1], self._learn()
            chooses = self._automatic is not None and self._automatic.chooses_all
            if learned or not (self._is_searched or chooses):
                self._is_searched = True
                self._search_again(batch, arguments, parts, has_learned=bool(learned))
                if self.searched is not None and self.searched.microbatch_size != workload.microbatch_size:
                    parts = self.split(batch)
                    workload = _workload(parts)
            if learned:
                level = logging.WARNING if self._share < share else logging.INFO
                log.log(level, "harmony: %s; %s", " and ".join(learned), self._outcome(former))
        if not engine.trace.is_complete:
            if self._residency is not None:
                self._residency.forget()
            engine.resize(workload.microbatch_size, workload.num_microbatches)
        if self._residency is not None:
            self._residency.before("training", parts.batches)
        return parts

    def check_order(self) -> None:
        """Behind the forward of a step: the first one shows whether a given plan is in the order of calls."""
        if self._given is None or self._has_traced or not self._engine.trace.is_complete:
            return
        self._has_traced = True
        if (fault := order_fault(self._given, self._engine.trace.order())) is not None:
            log.warning("harmony: the plan's packs are in another order than they are called: %s", fault)

    def before_evaluation(self, stage: str, batches: Sequence[Any]) -> None:
        """Steps of these batches share a pass."""
        self._notice_shortage()
        if self._residency is not None:
            self._residency.before(stage, batches)

    def before_manual(self) -> None:
        """A step comes that nobody measures."""
        self._notice_shortage()
        if self._residency is not None:
            self._residency.let_go()

    def _notice_shortage(self) -> None:
        """Memory was short in the former step: the next training step has a plan for less, once in a run."""
        state = self._engine.state
        self._was_short |= state.memory.has_lacked_memory
        state.memory.has_lacked_memory = False

    def _learn(self) -> list[str]:
        """What steps have shown that calls for another plan."""
        engine, uses = self._engine, self._engine.uses
        learned = []
        if self._was_short and not self._has_shrunk_behind:
            self._has_shrunk_behind = True
            self._share *= SMALLER_SHARE
            learned.append("memory was short, and what was to stay on GPUs had to go")
        if not self._has_traced:
            self._has_traced = True
            order, loops = engine.trace.order(), engine.trace.loops()
            if not engine.plan.follows(order, loops):
                self._call_order = CallOrder(layers=order, loops=loops)
                learned.append("layers are called in another order than they are registered")
        if (narrow := uses.narrow()) != self._narrow.weights:
            num_weights = len(frozenset[str]().union(*narrow.values()))
            self._narrow = Narrow(weights=narrow, dtype=uses.dtype_name)
            learned.append(f"{num_weights} weights are used in {uses.dtype_name} alone")
        return learned


def _workload(parts: Microbatches) -> Workload:
    return Workload(microbatch_size=max(parts.num_samples), num_microbatches=len(parts.batches))


def _for_workload(plan: Plan, workload: Workload) -> Plan:
    return replace(plan, microbatch_size=workload.microbatch_size, num_microbatches=workload.num_microbatches)
