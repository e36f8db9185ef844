"""A host that is to go: empty after the step in flight, without a step lost; and back when its agent is."""

from shoal.elastic import fleet as f
from shoal.elastic import membership as m


class Trained:
    """A fleet of three hosts whose workers do what they are told."""

    def __init__(self, processes: int = 3, servers: int = 0) -> None:
        self.fleet = f.Fleet(3, processes, 1, 8, servers)
        self.said = dict.fromkeys(range(3), 0)
        self.lives = {agent: 10 + agent for agent in range(3)}
        self.done: list[f.Instruction] = []
        for agent, life in self.lives.items():
            self.on(f.Up(agent, life, f"host-{agent}"))
        self.on(f.Begin(0))

    def on(self, value: f.Value) -> list[f.Instruction]:
        out = self.fleet.on(value, 0.0)
        self.done += out
        for instruction in out:
            if isinstance(instruction, m.Fork):
                for event in (f.Forked(instruction.seat, 100 + instruction.seat), m.Opened(instruction.seat)):
                    self.say(event)
                self.say(m.Ready(instruction.seat))
        return out

    def say(self, event: f.Event) -> list[f.Instruction]:
        home = self.fleet.homes[event.seat]
        assert home is not None
        self.said[home[0]] += 1
        return self.on(f.Said(*home, self.said[home[0]], event))

    def leave(self, step: int) -> None:
        for seat in self.fleet.membership.members:
            self.say(m.Left(seat, step, False))

    @property
    def hosts(self) -> list[str]:
        return sorted(self.fleet.host(seat) for seat in self.fleet.membership.members)

    def told(self, event: str) -> list[m.Tell]:
        return [each for each in self.done if isinstance(each, m.Tell) and each.event == event]


def test_a_drained_host_leaves_after_a_step_and_its_end_loses_nothing():
    run = Trained()
    assert run.hosts == ["host-0", "host-1", "host-2"]
    out = run.on(f.Wished(1, 0, "host:host-1", "a spot notice"))
    assert [type(each) for each in out] == [m.Ask], "after the step in flight, and nobody is made in their place"
    (gone,) = [seat for seat, home in run.fleet.homes.items() if home and home[0] == 1]
    run.leave(7)
    assert run.hosts == ["host-0", "host-2"]
    run.say(m.Dead(gone, ""))
    run.on(f.Lost(1, run.lives[1], "its agent has ended"))
    assert not run.told("lost")
    assert run.fleet.asked == 3


def test_a_drained_host_takes_its_part_again_when_its_agent_has_been_started_anew():
    run = Trained()
    run.on(f.Wished(1, 0, "host:1", ""))
    run.leave(7)
    assert run.on(f.Wished(2, 0, "host:1", "")) == [], "it is going already"
    run.said[1] = 0
    run.on(f.Up(1, 99, "host-1"))
    run.leave(9)
    assert run.hosts == ["host-0", "host-1", "host-2"]


def test_an_unknown_host_is_nobodys():
    run = Trained()
    assert run.on(f.Wished(1, 0, "host:host-7", "")) == []
    assert run.hosts == ["host-0", "host-1", "host-2"]


def test_servers_are_added_beside_as_many_workers_as_before_and_a_lost_one_is_called_a_server():
    run = Trained(processes=4, servers=1)
    run.on(f.Wished(1, 0, "", "", servers=2))
    run.leave(3)
    members = run.fleet.membership.members
    assert (len(members), run.fleet.servers) == (5, 2)
    assert [run.fleet.who(seat).split(" on ")[0] for seat in members] == [
        *("rank 0", "rank 1", "rank 2"),
        *("server 0", "server 1"),
    ]
    run.on(f.Wished(2, 0, "", "somebody asks for nothing"))
    assert run.fleet.asked == 5
    run.on(f.Wished(3, 2, "", ""))
    assert run.fleet.asked == 4, "two workers, and the servers stay"
