"""Parameter servers: the parameters lie in k processes, split by bytes; each takes gradients and runs the optimiser.

cuts.py      who holds what, as plain values
shard.py     what a server decides: events in, instructions out
optimizer.py which optimisers can run on slices, and how their options travel
store.py     the tensors of one server and what is done with them
service.py   messages in, messages out: joins the two
wire.py      the form of a message
shared.py    servers of the same host: doorbells over socket pairs, numbers in shared memory
tcp.py       servers anywhere: pyzmq
client.py    the workers' end
"""
