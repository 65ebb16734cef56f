"""What every test needs of the process that it runs in."""

import signal

# Commands in the background of a script, and of some CI systems, start with SIGINT ignored, and everything that they
# start inherits that. A handler of our own does not outlive exec: children then have the default again.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
