"""How long a rank waits for another before it ends with a message: every wait, in seconds."""

COLLECTIVE_S = 20.0  # one of the reference transport; gloo notices a rank that ended at once
OP_S = 22.0  # of the reference transport: longer, because its collectives say more
SHARING_S = 60.0  # one exchange of handles: driver calls, between two of them, take milliseconds
PLAN_S = 20.0  # for a plan to compare with
DEVICE_S = 20.0  # one wait on a GPU, by a kernel or by a stream: a client has its error within 30 s
