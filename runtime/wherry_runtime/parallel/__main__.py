"""A rank that another one of its pod started; nobody else is to run this."""

import ctypes
import os
import signal
import sys

from wherry_protocol.engine_config import from_args
from wherry_protocol.http.logs import set_up
from wherry_protocol.naming import EXIT_PEER_LOST
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.parallel.ending import end
from wherry_runtime.parallel.follow import Follower
from wherry_runtime.parallel.group import ENV_PARENT, place

PR_SET_PDEATHSIG = 1
EXIT_MODEL = 1


def main() -> None:
    """Follows until the leader stops. Exits with 0, or 1 where the model cannot be loaded."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(ENV_PARENT) != str(os.getppid()):
        sys.exit("a rank's process is started by the first rank of its pod")
    # The pod's first rank is told to stop, and stops the others.
    for ignored in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    config = from_args(sys.argv[1:])
    set_up()
    follower = Follower(config, place(config), lambda what: end(f"{EXIT_PEER_LOST}: {what}"))
    try:
        follower.start()
    except ModelError:
        sys.exit(EXIT_MODEL)  # the leader tells why
    follower.follow()


if __name__ == "__main__":
    main()
