"""`elastic-lm train` as one of several processes, which tests start, stop and kill.

Arguments: port, number of this process, number of processes, then those of the command.
"""

import sys

import jax

from elastic_lm.cli import main, train

STARTING = 60  # seconds until all processes are there
HEARTBEAT = 20  # seconds after which a process that says nothing counts as gone


def run(port: str, index: int, count: int, arguments: list[str]) -> None:
    """Runs the command once the processes are connected, as the command does it after it has begun."""
    load = train.load

    def connected(*args):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"localhost:{port}",
            count,
            index,
            initialization_timeout=STARTING,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
        return load(*args)

    train.load = connected
    sys.argv = ["elastic-lm", "train", *arguments]
    raise SystemExit(main.main())


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
