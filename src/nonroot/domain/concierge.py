"""What a sealed domain's process gets of its client while it runs: connections to XenStore's process."""

import contextlib
import socket
import threading

__all__ = ["Concierge"]


class Concierge:
    """The client's part: a thread that makes connections to XenStore's process for one domain."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threading.Thread(target=self._serve, args=(ours,), name="nonroot-concierge", daemon=True).start()

    def given(self) -> None:
        """The domain's process has its end: the thread ends with that."""
        self.theirs.close()

    @staticmethod
    def _serve(ours: socket.socket) -> None:
        with ours, contextlib.suppress(OSError):
            while ours.recv(16):
                from nonroot.xenstore import place
                from nonroot.xenstore.errors import XenStoreLostError

                connection = None
                with contextlib.suppress(OSError, XenStoreLostError):
                    connection = place.open_socket(place.ensure())
                if connection is None:
                    ours.send(b"nobody")
                    continue
                with connection:
                    socket.send_fds(ours, [b"here"], [connection.fileno()])
