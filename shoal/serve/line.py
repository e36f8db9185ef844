"""The line of requests that no model process has yet."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from shoal.serve.engine import Request


@dataclass
class Line:
    """Who waits: higher priorities first, of one priority the clients in turn, of one client who came first."""

    _by_priority: dict[int, "OrderedDict[str, deque[Request]]"] = field(default_factory=dict)
    _ids: set[int] = field(default_factory=set)
    work: int = 0  # cost of those that wait

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, id: int) -> bool:
        return id in self._ids

    def push(self, request: Request, first: bool = False) -> None:
        clients = self._by_priority.setdefault(request.priority, OrderedDict())
        queue = clients.setdefault(request.client, deque())
        if first:
            queue.appendleft(request)
            clients.move_to_end(request.client, last=False)
        else:
            queue.append(request)
        self._ids.add(request.id)
        self.work += request.cost

    def peek(self) -> Request | None:
        """The next one; those that were dropped are passed over."""
        for priority in sorted(self._by_priority, reverse=True):
            clients = self._by_priority[priority]
            while clients:
                client, queue = next(iter(clients.items()))
                while queue and queue[0].id not in self._ids:
                    queue.popleft()
                if queue:
                    return queue[0]
                del clients[client]
            del self._by_priority[priority]
        return None

    def pop(self) -> Request:
        """Takes the one that ``peek`` shows, and puts its client behind the others."""
        request = self.peek()
        if request is None:
            raise IndexError("nobody waits")
        clients = self._by_priority[request.priority]
        clients[request.client].popleft()
        clients.move_to_end(request.client)
        self.drop(request)
        return request

    def drop(self, request: Request) -> None:
        """It waits no more, if it did."""
        if request.id in self._ids:
            self._ids.discard(request.id)
            self.work -= request.cost
