"""`python -m webui`: the chat page."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

# Gradio reads this while it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from webui.app import create_app
from webui.client import ApiClient
from webui.server import Server

API_KEY_VARIABLE = "ROOTGRAFT_API_KEY"


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    options = _parser().parse_args(argv)
    try:
        sock = socket.create_server((options.host, options.port), family=_family(options.host))
    except OSError as error:
        where = f"{options.host}:{options.port}"
        # `create_server` adds to `strerror` what `where` says; getaddrinfo's errors have numbers of their own.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        print(f"error: cannot listen on {where}: {reason}; choose another --port or --host", file=sys.stderr)
        return 1
    client = ApiClient(options.controller, api_key=options.api_key or environ.get(API_KEY_VARIABLE) or None)
    server = Server(create_app(client))
    host, port = sock.getsockname()[:2]
    print(f"Web UI at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    server.run(sockets=[sock])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m webui", description="Chat with the served models in a browser.")
    parser.add_argument(
        "--controller", type=_url, default="http://127.0.0.1:8000", metavar="URL", help="(default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=7860, metavar="INT", help="0: the system chooses (default: 7860)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"sent to the controller; better given as the environment variable {API_KEY_VARIABLE}",
    )
    return parser


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"expected a URL such as http://host:8000, got {text!r}")
    return text


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


if __name__ == "__main__":
    sys.exit(main())
