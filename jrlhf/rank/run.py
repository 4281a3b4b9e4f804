"""Runs `jrlhf rank`: serves the page, or exports, imports or reports the decisions."""

import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from jrlhf.config import ConfigError
from jrlhf.config.tools import RankConfig
from jrlhf.rank.exchange import export_text, import_rankings
from jrlhf.rank.store import Store
from jrlhf.rank.tasks import Task, is_name, read_tasks
from jrlhf.system.lines import write_output
from jrlhf.system.terminal import show_all_characters


def run_rank(args: RankConfig) -> None:
    """Serve the page until ctrl-C, or export, import or report."""
    show_all_characters()
    path = Path(args.tasks)
    file = read_tasks(path)
    for note in file.notes():
        print(f"jrlhf: {path}: {note}", file=sys.stderr)
    store = Store(Path(args.state) if args.state else path.with_suffix(".sqlite"))
    try:
        if args.report:
            _report(file.tasks, store)
        elif args.export:
            _export(args, file.tasks, store)
        elif args.import_from:
            for note in import_rankings(Path(args.import_from), args.format, file.tasks, store):
                print(note)
        else:
            _serve(args, file.tasks, store)
    finally:
        store.close()


def _report(tasks: Sequence[Task], store: Store) -> None:
    from jrlhf.rank.report import as_text, figures

    try:
        print(as_text(figures(tasks, store.standing())))
    except ModuleNotFoundError as error:
        raise _missing(error) from error


def _export(args: RankConfig, tasks: Sequence[Task], store: Store) -> None:
    text, notes = export_text(tasks, store.standing(), args.format)
    write_output(args.export, text)
    for note in notes:
        print(f"jrlhf: {note}", file=sys.stderr)


def _missing(error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(f'rank: {error.name} is missing; pip install "jrlhf[rank]"')


def _serve(args: RankConfig, tasks: Sequence[Task], store: Store) -> None:
    try:
        import uvicorn

        from jrlhf.rank.app import make_app
        from jrlhf.rank.guard import OWN_NAMES, shown_host
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    if args.rater and not is_name(args.rater.strip()):
        raise ConfigError(f"rater: must be a name of at most 64 printable characters, got {args.rater!r}")
    if args.host not in OWN_NAMES:
        print(
            f"jrlhf: {args.host}: other machines can reach the page, unencrypted; everyone with its address can rank",
            file=sys.stderr,
        )
    token = secrets.token_urlsafe(24)
    listener = _listen(args.host, args.port)
    shown = shown_host(args.host)
    where = f"[{shown}]" if ":" in shown else shown
    rater = f"&rater={quote(args.rater.strip())}" if args.rater else ""
    print(f"{len(tasks)} tasks; open http://{where}:{listener.getsockname()[1]}/?token={token}{rater}")
    print("Every decision is saved at once; ctrl-C ends the page, and the same command continues.", flush=True)
    app = make_app(tasks, store, token=token, host=args.host)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, proxy_headers=False)
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # From here on a browser that connects before the server is ready waits for it.
        listener.listen()
    except OSError as error:
        raise ConfigError(f"host: cannot listen at {host}:{port}: {error}") from error
    return listener
