"""How a step's gradient becomes new weights: on every worker, on parameter servers, or averaged now and then.

docs/parameter_server.md says what each scheme promises. `Worker` holds one `Update`; a step and the loop call it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shoal.comm import sgd
from shoal.comm.exchange import Denominators, Exchange, Placement, Terms
from shoal.comm.group import Group, HostGroup
from shoal.comm.layout import Layout
from shoal.comm.server import optimizer as optimizers
from shoal.comm.server import roster
from shoal.comm.server.client import Client
from shoal.comm.server.exchanges import LocalExchange, OwnPlacement, ServedExchange, StaleExchange
from shoal.comm.transport import make_exchange
from shoal.data.ledger import Ledger
from shoal.errors import UserError
from shoal.memory.optimizer_need import state_bytes
from shoal.parallel.held import Held
from shoal.parallel.pipeline.engine import Pipeline
from shoal.recipe.plan import Plan
from shoal.train.at_rest import AtRest, StatesAtRest
from shoal.train.average import Average
from shoal.train.figures import StepFigures
from shoal.train.gradients import Gradients

Told = tuple[int, StepFigures, dict[str, Any]]  # step, its figures over all workers, what else is said of it


class Update(Protocol):
    """Called by every worker, in the same order."""

    optimizer: torch.optim.Optimizer
    equal: bool  # all workers have the same weights before every step
    rest: AtRest  # what nobody writes to between two updates
    watches: bool  # each worker knows what it has left of its slices of weights that are there once for all
    votes: bool  # in each step, workers compare the parameters that they hold alike, or say whether slices are as left
    publishes_later: bool  # `step` leaves it to its caller to `publish`
    meets: bool  # `settle` waits until all workers have published the step

    def check_readable(self) -> None:
        """Raises UserError when not all weights are on this worker right now: `settle` brings them."""

    def begin(self, ledger: Ledger) -> None:
        """Before the first step, when weights and optimiser are those that training goes on with."""

    def arrive(self) -> None:
        """Wait until the weights are those of the step to come."""

    def step(self, number: int, figures: StepFigures) -> None:
        """Update the weights with the gradient that has just been finished; they are there after `arrive`."""

    def publish(self) -> None:
        """Let the others go on from what `step` has done here."""

    def take_back(self) -> None:
        """Instead of `step`, called by all workers: the gradient that has just been finished is made again."""

    def stops(self, number: int, figures: StepFigures) -> bool:
        """Whether all workers end after this step, because one was asked to."""

    def settle(self, number: int) -> None:
        """Make weights and buffers equal on all workers."""

    def fetch(self) -> None:
        """Make ``optimizer`` hold the state that belongs to the weights, on rank 0; called by all, after `settle`."""

    def told(self) -> list[Told]:
        """On rank 0: steps that all workers have done since the last call, in order."""

    def leave(self) -> None:
        """Let go of the module: no hook acts any more."""

    def state_bytes(self) -> int:
        """What the optimiser's states take on this worker."""

    def count_anew(self) -> None:
        """`beside_bytes` is from now on."""

    def beside_bytes(self) -> int:
        """What slices of states, parameters and partial sums have taken at the most, where torch has not allocated it;
        of memory that workers share, this worker's part. After a step."""

    def close(self) -> None: ...


def placement_of(plan: Plan, ownership: Sequence[range], rank: int, *, in_a_row: bool = False) -> Placement:
    """``in_a_row``: a worker's gradients are added up as they come, whatever the plan says."""
    own = plan.sync == "local" or (plan.sync == "parameter-server" and plan.staleness != 0)
    if own:
        return OwnPlacement(ownership[rank])
    return Placement(ownership, rank, fast=in_a_row or plan.sync == "fast" or plan.compresses)


def exchange_of(
    plan: Plan,
    group: Group,
    placement: Placement,
    most: tuple[int, ...],
    device: torch.device,
    shapes: Sequence[tuple[int, ...]],
    layout: Layout,
    facts: int,
    denominators: Denominators,
    dtype: torch.dtype,
) -> Exchange:
    """``shapes``: of the parameters, in the order of the layout."""
    terms = Terms(layout, placement, most, facts, denominators, dtype, device)
    if plan.compresses and not (plan.splits_model and group.world == 1):  # nobody else has this part of the model
        from shoal.comm.compression.exchange import compressed_exchange

        return compressed_exchange(plan.compression, group, terms, shapes=list(shapes), force=plan.compression_force)
    if plan.shards_states:
        from shoal.train.sharded_states import sliced_exchange

        return sliced_exchange(plan, group, terms)
    if plan.sync in ("exact", "fast"):
        return make_exchange(group, terms)
    if device.type != "cpu":
        raise UserError(f"plan: sync = {plan.sync!r} trains on the processor only: leave device = {plan.device!r} out.")
    served = StaleExchange if plan.staleness else ServedExchange
    kind = LocalExchange if plan.sync == "local" else served
    made: Exchange = kind(group, terms)
    return made


def update_of(held: Held, sets: Sequence[Gradients], optimizer: torch.optim.Optimizer) -> Update:
    """``sets``: one for each of ``held.shares``."""
    plan, group, gradients = held.plan, held.group, sets[0]
    if plan.sync == "local":
        return Averaging(plan, group, gradients, optimizer)
    if plan.sync == "parameter-server":
        return (Stale if plan.staleness else Served)(held, gradients, optimizer)
    trained = {name: each for some in sets for name, each in zip(some.names, some.parameters, strict=True)}
    if plan.shards_states:
        from shoal.train.sharded_sets import sharded

        apart = sharded(held, sets, optimizer)
        if not plan.memory.changes_updates:
            apart.rest = AtRest(apart.states_of(trained), apart.unwatched())
        return apart
    made = Everywhere(optimizer, held.pipeline)
    made.votes = group.world > 1
    if not plan.memory.changes_updates:  # what keeps states elsewhere moves them about between updates
        alone = group.world == 1 or held.pipeline is not None
        made.rest = AtRest(made.states_of(trained), trained.items() if alone else ())
    return made


class Everywhere:
    """Every worker has the global mean gradient, and makes the same update."""

    equal = True
    watches = False
    votes = False
    publishes_later = meets = False

    def __init__(self, optimizer: torch.optim.Optimizer, pipeline: Pipeline | None = None) -> None:
        self.optimizer, self._pipeline = optimizer, pipeline
        self._told: list[Told] = []
        self._ledger: Ledger | None = None
        self.rest = AtRest(tuple)  # nothing is watched

    def states_of(self, trained: Mapping[str, nn.Parameter]) -> Callable[[], StatesAtRest]:
        """Of each of these parameters, what this worker's optimiser holds, by name, whenever it is asked."""
        state = self.optimizer.state
        return lambda: [(name, state[each]) for name, each in trained.items() if each in state]

    def begin(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def _passes(self, number: int) -> tuple[int, ...]:
        assert self._ledger is not None
        return self._ledger.passes(number - 1)

    def check_readable(self) -> None: ...
    def arrive(self) -> None: ...

    def step(self, number: int, figures: StepFigures) -> None:
        sgd.update(self.optimizer)
        if self._pipeline is not None:
            self._pipeline.share_tied()
        self._told.append((number, figures, {}))

    def publish(self) -> None: ...
    def take_back(self) -> None: ...

    def stops(self, number: int, figures: StepFigures) -> bool:
        return figures.stop

    def settle(self, number: int) -> None: ...
    def fetch(self) -> None: ...

    def told(self) -> list[Told]:
        told, self._told = self._told, []
        return told

    def leave(self) -> None: ...
    def close(self) -> None: ...
    def count_anew(self) -> None: ...

    def state_bytes(self) -> int:
        return state_bytes(self.optimizer)

    def beside_bytes(self) -> int:
        return 0


class _OnServers(Everywhere):
    """Servers hold the parameters and run the optimiser; the local one says what it is, and holds no state."""

    exchange: ServedExchange | StaleExchange

    def __init__(self, held: Held, gradients: Gradients, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.plan, self.group, self.module, self.gradients = held.plan, held.group, held.module, gradients
        exchange = gradients.exchange
        assert isinstance(exchange, ServedExchange | StaleExchange)
        self.exchange = exchange
        self.votes = held.plan.staleness == 0 and held.group.world > 1 and not isinstance(held.group, HostGroup)
        gradients.remembers = False  # weights come in while the step begins
        self._client: Client | None = None
        self._roster: roster.Roster | None = None

    @property
    def client(self) -> Client:
        assert self._client is not None
        return self._client

    def begin(self, ledger: Ledger) -> None:
        super().begin(ledger)
        if self._client is not None:
            return
        gradients, plan = self.gradients, self.plan
        dtype = self.exchange.terms.dtype
        setup = roster.setup_of(
            self.exchange,
            gradients.parameters,
            gradients.buffers,
            self.optimizer,
            servers=plan.servers,
            bound=None if plan.staleness < 0 else plan.staleness,
            bucket_elements=plan.bucket_bytes // dtype.itemsize,
        )
        self._roster = roster.reach(self.group, plan.servers)
        embeddings = {id(m.weight) for m in self.module.modules() if isinstance(m, nn.Embedding)}
        sparse = [slot for slot, parameter in enumerate(gradients.parameters) if id(parameter) in embeddings]
        self._client = roster.connect(
            self.exchange,
            self._roster,
            setup,
            gradients.parameters,
            self.optimizer,
            sparse=sparse,
            compression=plan.compression,
        )

    def arrive(self) -> None:
        if self._client is not None:
            self.exchange.arrive()

    def fetch(self) -> None:
        if self._client is not None and self.group.rank == 0:
            self.arrive()
            self.client.fetch_state(self.optimizer)

    def close(self) -> None:
        if self._roster is not None:
            self._roster.close()


class Served(_OnServers):
    """Synchronous: the bits of every worker making the same update."""

    meets = True  # an update is made once all have committed

    def step(self, number: int, figures: StepFigures) -> None:
        self._commits = optimizers.options_of(self.optimizer), self.gradients.unused()
        if not self.publishes_later:
            self.publish()
        for parameter in self.gradients.parameters:
            parameter.grad = None  # the servers scale it, use it up and write the next one over it
        self._told.append((number, figures, {}))

    def publish(self) -> None:
        assert isinstance(self.exchange, ServedExchange)
        self.exchange.commit(*self._commits)

    def take_back(self) -> None:
        assert isinstance(self.exchange, ServedExchange)
        self.exchange.take_back()

    def settle(self, number: int) -> None:
        self.arrive()


class Stale(_OnServers):
    """Each worker's own mean goes to the servers when it is ready; weights come back when the bound allows."""

    equal = False

    def __init__(self, held: Held, gradients: Gradients, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(held, gradients, optimizer)
        self._rows: dict[int, dict[int, Tensor]] = {}  # step -> worker -> facts, norm, steps ahead
        self._ahead, self._last, self._first = 0, -1, 0
        self._buffers = Average(held.group, held.plan)

    def arrive(self) -> None:
        grant = self.exchange.arrive() if self._client is not None else None
        if grant is None:
            return
        self._ahead = grant.ahead
        if self._last < 0 <= grant.last:
            self._last = grant.last
        for worker, clock, row in grant.rows:
            self._rows.setdefault(clock + self._first, {})[worker] = torch.frombuffer(
                bytearray(row), dtype=torch.float64
            )

    def step(self, number: int, figures: StepFigures) -> None:
        assert isinstance(self.exchange, StaleExchange)
        assert self._ledger is not None
        self._first = number - self.exchange.clock + 1  # the step that has clock 0 on the servers
        counts = self._ledger.counts(number - 1)
        share = sum(counts[shard] for shard in self.exchange.placement.ownership[0]) / sum(counts)
        figure = torch.tensor([figures.norm, self._ahead], dtype=torch.float64)
        row = torch.cat([self.exchange.facts, figure, torch.from_numpy(self.exchange.rows[self.group.rank])])
        if self.group.rank == 0:
            self._rows.setdefault(number, {})[0] = row
        groups, unused = optimizers.options_of(self.optimizer), self.gradients.unused()
        data = row.numpy().tobytes()
        self.exchange.commit(groups, unused, share=share, stop=figures.stop, row=data)
        for parameter in self.gradients.parameters:
            parameter.grad = None

    def stops(self, number: int, figures: StepFigures) -> bool:
        return 0 <= self._last <= number - self._first + 1

    def settle(self, number: int) -> None:
        self.arrive()
        self.group.gather(b"")  # all have committed this step, and the servers have applied it
        if self._client is not None:
            self.client.pull()
            self.arrive()
            self.group.gather(b"")  # nobody goes on before all have these weights
        self._buffers(self.gradients.buffers, [])

    def told(self) -> list[Told]:
        found: list[Told] = []
        for number in sorted(self._rows):
            rows = self._rows[number]
            if len(rows) < self.group.world:
                break
            table = torch.stack([rows[worker] for worker in range(self.group.world)])
            end = len(self.exchange.facts)
            ahead = table[:, end + 1].tolist()
            norm = math.sqrt(math.fsum(n * n for n in table[:, end].tolist()) / len(ahead))
            figures = self.gradients.figures(norm, table[:, :end], self._passes(number))
            self.exchange.rows[1:] = table[1:, end + 2 :].numpy()
            extra = {"staleness": {"max": int(max(ahead)), "mean": sum(ahead) / len(ahead)}}
            found.append((number, figures, extra))
            del self._rows[number]
        return found


class Averaging(Everywhere):
    """Every worker trains on its own shards alone; every ``average_every`` steps all take the mean of their weights.

    Local SGD (Stich, 2019). The optimiser's state is averaged too, so that all workers are equal after an average."""

    equal = False

    def __init__(self, plan: Plan, group: Group, gradients: Gradients, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.plan, self.group, self.gradients = plan, group, gradients
        self._average = Average(group, plan)
        self._rows: dict[int, Tensor] = {}
        self._settled = 0
        self._stop = self._stopping = False

    def step(self, number: int, figures: StepFigures) -> None:
        sgd.update(self.optimizer)
        self._stop |= figures.stop
        exchange = self.gradients.exchange
        self._rows[number] = torch.cat([exchange.facts, torch.tensor([figures.norm], dtype=torch.float64)])
        if number % self.plan.average_every == 0:
            self.settle(number)

    def stops(self, number: int, figures: StepFigures) -> bool:
        return self._stopping

    def settle(self, number: int) -> None:
        if number == self._settled:
            return
        self._settled = number
        weights = [parameter.data for parameter in self.gradients.parameters]
        state = self._shared_state()
        stop = torch.tensor([float(self._stop)])
        self._average([*self.gradients.buffers, stop], [*weights, *state])
        self._stopping = bool(stop.any())
        numbers = sorted(self._rows)
        table = torch.stack([self._rows.pop(n) for n in numbers])
        every = [
            torch.frombuffer(bytearray(rows), dtype=torch.float64).view(len(numbers), -1)
            for rows in self.group.gather(table.numpy().tobytes())
        ]
        if self.group.rank == 0:
            for index, n in enumerate(numbers):
                rows = torch.stack([rows[index] for rows in every])
                norm = math.sqrt(math.fsum(x * x for x in rows[:, -1].tolist()) / len(rows))
                self._told.append((n, self.gradients.figures(norm, rows[:, :-1], self._passes(n)), {}))

    def _shared_state(self) -> list[Tensor]:
        """The optimiser's tensors to be averaged. What is no vector, a counter of steps say, becomes rank 0's; a worker
        that has had no sample so far begins with zeros. Rank 0 always has samples."""
        parameters, state = self.gradients.parameters, self.optimizer.state
        said = []
        if self.group.rank == 0:
            for slot, parameter in enumerate(parameters):
                for key, value in state.get(parameter, {}).items():
                    vector = isinstance(value, Tensor) and value.dim() and value.is_floating_point()
                    told = None if vector else optimizers.plain(value)
                    shape = list(value.shape) if vector else []
                    said.append([slot, key, told, shape, str(value.dtype).split(".")[1] if vector else ""])
        found = []
        for slot, key, told, shape, dtype in json.loads(self.group.gather(json.dumps(said).encode())[0]):
            own = state[parameters[slot]]
            if not shape:
                value = own.get(key)
                if isinstance(value, Tensor) and isinstance(told, dict):
                    value.fill_(told["tensor"])
                else:
                    own[key] = optimizers.restored(told)
                continue
            if key not in own:
                own[key] = torch.zeros(shape, dtype=getattr(torch, dtype))
            found.append(own[key])
        return found
