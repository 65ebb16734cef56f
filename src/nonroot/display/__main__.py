"""``python -m nonroot.display --control-fd N``: the VNC server of one domain. Started by the domain's process."""

import argparse
import asyncio
import contextlib
import faulthandler
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from nonroot.display.link import ControlLink
from nonroot.display.render import Renderer
from nonroot.display.vnc import VncServer
from nonroot.domain import host
from nonroot.errors import DomainLostError, NonrootError

__all__ = ["main"]


async def serve(link: ControlLink, order: dict[str, Any], memory: memoryview) -> None:
    """Serve until the domain goes."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    link.on_lost = gone.set
    server = VncServer(link, Renderer(memory), str(order["title"]), order.get("password"))
    web: list[Any] = []
    tasks: set[asyncio.Task[None]] = set()

    async def make_link(record: dict[str, Any]) -> None:
        try:
            if not web:
                from nonroot.display.web import WebServer

                made = WebServer(server, Path(record["root"]))
                await made.start()
                web.append(made)
            answer = {"url": web[0].link()}
        except ImportError:
            answer = {"error": "the screen in a browser needs the Python package websockets"}
        except OSError as error:
            answer = {"error": f"the web server cannot listen: {error.strerror or error}"}
        await link.request("web_ready", number=record["number"], **answer)

    def event(record: dict[str, Any]) -> None:
        if record.get("event") == "web":
            task = loop.create_task(make_link(record))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    link.on_event = event
    link.attach(loop)
    path = order.get("path")
    try:
        if order.get("password") is not None:
            server.check(bytes(16), bytes(16))  # is there a DES at all?
        if path is not None:
            address = await server.listen_unix(path)
        else:
            address = await server.listen_tcp(str(order["host"]), int(order["port"]))
    except ImportError:
        await link.request("vnc_ready", error="VNC with a password needs the Python package cryptography")
        return
    except OSError as error:
        await link.request("vnc_ready", error=f"the VNC server cannot listen: {error.strerror or error}")
        return
    drawing = loop.create_task(server.run())
    try:
        await link.request("vnc_ready", address=address)
        waiting = loop.create_task(gone.wait())
        await asyncio.wait({drawing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if drawing.done():
            drawing.result()
    finally:
        drawing.cancel()
        if path is not None:
            Path(path).unlink(missing_ok=True)


def main() -> None:
    """Serve until the domain goes; never returns."""
    parser = argparse.ArgumentParser(prog="python -m nonroot.display", description="The VNC server of one domain.")
    parser.add_argument("--control-fd", type=int, required=True, help="a connected Unix stream socket")
    options = parser.parse_args()
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    host.die_with_parent()
    host.name_process("nonroot-vnc")
    os.set_inheritable(options.control_fd, False)
    link = ControlLink(socket.socket(fileno=options.control_fd))
    with contextlib.suppress(EOFError, ConnectionError, DomainLostError):
        order = link.wait_event("serve")
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        try:
            asyncio.run(serve(link, order, memoryview(link.memory())))
        except NonrootError as error:
            sys.exit(f"nonroot-vnc: {error}")


if __name__ == "__main__":
    main()
