"""`wherry-runtime`: one engine behind the worker API."""

import asyncio
import sys

import uvloop

from wherry_protocol.engine_config import EngineConfig, from_args
from wherry_protocol.http.logs import set_up
from wherry_protocol.http.server import AddressError
from wherry_protocol.http.tls import TlsError
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.server.lifecycle import tell_why
from wherry_runtime.server.run import SettingsError, listen, run, worker_token
from wherry_runtime.server.surface import Engine
from wherry_runtime.sources.progress import Download


def _engine(config: EngineConfig, download: Download) -> Engine:
    """What this process is: an engine, or a rank of another pod's.

    Raises:
        ModelError: bad_setting, where settings and environment do not fit together.
    """
    # Imported late: a mistake in the settings is told before torch is loaded.
    from wherry_runtime.parallel.group import place

    if not place(config).shard.first:
        from wherry_runtime.parallel.rank_engine import RankEngine

        return RankEngine(config, download)
    from wherry_runtime.engine.model_engine import ModelEngine

    return ModelEngine(config, download)


def main(argv: list[str] | None = None) -> None:
    """Runs until SIGTERM. Exits with 0, 1 (the model cannot be loaded) or 2 (the settings are wrong)."""
    download = Download()
    config = from_args(sys.argv[1:] if argv is None else argv)
    set_up()
    try:
        token = worker_token(config.host)
        where = listen(config)
    except (SettingsError, AddressError, TlsError) as error:
        tell_why(f"{error}")
        sys.exit(2)
    try:
        engine = _engine(config, download)
    except ModelError as error:
        tell_why(f"{error.code}: {error.message}")
        sys.exit(2)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(run(engine, config, where, token, download))
    sys.exit(status)


if __name__ == "__main__":
    main()
