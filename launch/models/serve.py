"""`gptdist serve`: a small server of OpenAI's protocol, and a page to type into, to try a model with.

Knows where to listen and how the server begins and ends; what it answers is in `gptdist/serve/`.
"""

import argparse
import ipaddress
import os
import signal
import socket
import stat
import sys
from pathlib import Path

from gptdist.errors import EXIT_DONE, LaunchError

_ENDING_SECONDS = 3


def main(args: argparse.Namespace) -> int:
    """Serve until TERM or Ctrl-C."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise LaunchError(
            f"gptdist serve needs FastAPI and uvicorn, and {error.name} is not installed. Install the extra: "
            "pip install 'gptdist[serve]'."
        ) from None
    key = _read_key(args.api_key_file)
    with _listen(args.host, args.port) as listener:
        _warn_of(args.host, key)
        return _serve(args, listener, key)


def _serve(args: argparse.Namespace, listener: socket.socket, key: str | None) -> int:
    import uvicorn

    from gptdist.serve.api import build_app
    from gptdist.serve.completion import ServedModel
    from launch.models.trained import open_trained

    with open_trained(args.path, trust_others=args.trust_others) as trained:
        name = args.name or args.path.resolve().name
        model = ServedModel(name, trained.engine, trained.comms, trained.tokenizer, trained.opening)
        local = _is_loopback(args.host)
        hosts = frozenset({"localhost", "127.0.0.1", "[::1]", args.host.lower()}) if local else None
        config = uvicorn.Config(
            build_app(model, api_key=key, hosts=hosts),
            log_level="warning",
            access_log=False,
            ws="none",
            timeout_graceful_shutdown=_ENDING_SECONDS,
        )
        # uvicorn ends at these, then raises them again for whoever listened before it.
        before = {number: signal.signal(number, _nothing) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            what = f"step {trained.step:,} of {trained.path}" if trained.step is not None else str(trained.path)
            print(f"serving {what} as {name!r}", flush=True)
            print(f"page: {_url(args.host, listener)}   clients: {_url(args.host, listener)}v1", flush=True)
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return EXIT_DONE


def _nothing(number: int, frame: object) -> None:
    """The server has ended by then."""


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded: a mistake is told at once, and who comes early waits. Raises LaunchError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LaunchError(f"--host {host} is no address of a machine: {reason}.") from None
    except OSError as error:
        raise LaunchError(
            f"The server cannot listen on port {port} of {host}: {os.strerror(error.errno or 0)}. Give a free port, or "
            "0 for any, with --port, and an address of this machine with --host."
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _warn_of(host: str, key: str | None) -> None:
    if not _is_loopback(host):
        who = "who knows the key" if key else "and there is no key (--api-key-file)"
        print(
            f"warning: listening on {host}: open to every machine that reaches this one, {who}. What is sent is not "
            "encrypted.",
            file=sys.stderr,
            flush=True,
        )


def _url(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}/"


def _read_key(path: Path | None) -> str | None:
    """From a file, as a command line can be read by everybody on the machine."""
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise LaunchError(f"--api-key-file {path} cannot be read: {reason}.") from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise LaunchError(f"--api-key-file {path} must hold one key, of printable ASCII characters without spaces.")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        print(f"warning: others on this machine may read {path}; chmod 600 it", file=sys.stderr, flush=True)
    return key
